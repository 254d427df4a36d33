"""Kills programs again and again at random moments and restarts each on the files that the kill left.

    python tests/faults/kills.py --kills 150             # rerun it to resume; OUT/SEED-WAYS/state.json keeps the state
    python tests/faults/kills.py --kills 20 --ways TERM TERM,TERM INT INT,INT --only Run Pictures

A kill comes a random time after the start, after a piece of work was finished, or during a write.  The table counts for
each program: kills, finished rounds, lost work, work done twice, results whose bits differ from an undisturbed run's,
and other errors.  The exit status is 1 if anything was wrong.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from faults.works import WORKS  # noqa: E402

LONG = 900.0  # seconds after which the wait for a moment ends and the program is killed
MOMENTS = ("start", "progress", "progress", "writing")
FAULTS = ("lost", "twice", "other bits", "else")


def wait(work, process, moment, noise):
    """Waits for a moment of a program, at most LONG seconds; returns whether the program still runs."""
    begin, seconds, before = time.monotonic(), noise.uniform(0, 6), work.progress()
    while process.poll() is None:
        now = time.monotonic() - begin
        if moment == "start" and now > seconds or moment == "progress" and work.progress() > before:
            break
        if moment == "writing" and work.writing() or now > LONG:
            break
        time.sleep(0.002 if moment == "writing" else 0.01)
    time.sleep(noise.uniform(0, 0.01 if moment == "writing" else 0.4))
    return process.poll() is None


def struck(work, way, noise):
    """Starts a program and stops it by signals; returns (whether it was stopped, its status, what was wrong)."""
    before, length = work.done(), work.said.stat().st_size if work.said.exists() else 0
    process = work.start()
    # Before the program handles Ctrl-C itself, Python prints a traceback.
    moment = noise.choice(MOMENTS[1:] if "INT" in way else MOMENTS)
    came = wait(work, process, moment, noise)
    for number in way if came else ():
        process.send_signal(getattr(signal, f"SIG{number}"))
        time.sleep(noise.uniform(0, 0.3) if len(way) > 1 else 0)
    status = process.wait()
    lost, twice = work.lost(before)
    wrong = [("lost", one) for one in lost] + [("twice", one) for one in twice]
    first = getattr(signal, f"SIG{way[0]}")
    fine = {0, -first} if way == ["KILL"] else {0, -first, 128 + first, 130}
    said = work.said.read_bytes()[length:].decode(errors="replace")
    if status not in fine or "Traceback" in said and status != -first:
        wrong.append(("else", f"{'+'.join(way)} at {moment}: status {status}: {said[-300:]}"))
    return came and status != 0, status, wrong


def whole(kind, out):
    """Returns the result of an undisturbed run of a program; its files are kept for later starts."""
    work = kind(out / "outside", out / "whole" / kind.__name__)
    if not (out / "whole" / f"{kind.__name__}.made").exists():
        shutil.rmtree(work.place)
        work = kind(out / "outside", work.place)
        status = work.start().wait()
        if status:
            raise SystemExit(f"error: {kind.__name__} ends with {status} alone: {work.said.read_text()[-2000:]}")
        (out / "whole" / f"{kind.__name__}.made").touch()
    else:
        work.line()
    return work.result()


def ended(work, wanted):
    """Returns [(fault, detail)] of a finished round: differences from the result `wanted`, and files left behind."""
    try:
        found = work.result()
    except AssertionError as error:
        return [("lost", str(error))]
    wrong = [("other bits", name) for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    return wrong + [("else", f"left behind: {path}") for path in work.place.rglob("*saving-*")]


def run(kind, kills, out, ways, seed, state, keep):
    """Kills one program `kills` times in total; keep() writes the state after each start.

    More than 20 faults end it early.
    """
    mine = state.setdefault(kind.__name__, {"kills": 0, "rounds": 0, "starts": 0, "seconds": 0.0, "wrong": []})
    wanted = whole(kind, out) if mine["kills"] < kills else None
    while mine["kills"] < kills:
        begin, noise = time.monotonic(), random.Random(f"{seed} {kind.__name__} {mine['starts']}")
        work = kind(out / "outside", out / "struck" / f"{kind.__name__}-{mine['rounds']}")
        hit, status, wrong = struck(work, noise.choice(ways), noise)
        mine["starts"] += 1
        if hit:
            mine["kills"] += 1
        elif status == 0:
            wrong += ended(work, wanted)
            mine["rounds"] += 1
            if not wrong:
                shutil.rmtree(work.place)
        mine["wrong"] += wrong
        mine["seconds"] += time.monotonic() - begin
        keep()
        print(f"\r{kind.__name__}: {mine['kills']} of {kills}", end="", file=sys.stderr, flush=True)
        if len(mine["wrong"]) > 20:
            break
    if mine["kills"] >= kills and not mine.get("over"):  # the last round runs to its end undisturbed
        work = kind(out / "outside", out / "struck" / f"{kind.__name__}-{mine['rounds']}")
        status = work.start().wait()
        mine["wrong"] += ended(work, wanted or whole(kind, out)) if status == 0 else [("else", f"ends with {status}")]
        mine["rounds"] += 1
        mine["over"] = True
        keep()


def table(state):
    """Returns the lines of the table."""
    lines = [f"{'':12}{'kills':>7}{'rounds':>8}" + "".join(f"{name:>12}" for name in FAULTS) + f"{'seconds':>9}"]
    total = dict.fromkeys(("kills", "rounds", "seconds", *FAULTS), 0)
    for name, one in [*state.items(), ("all", None)]:
        if one is not None:
            row = {fault: sum(kind == fault for kind, _ in one["wrong"]) for fault in FAULTS}
            row |= {key: one[key] for key in ("kills", "rounds", "seconds")}
            total = {key: total[key] + row[key] for key in total}
        else:
            row = total
        counts = "".join(f"{row[fault]:>12}" for fault in FAULTS)
        lines.append(f"{name:12}{row['kills']:>7}{row['rounds']:>8}{counts}{row['seconds']:>9.0f}")
    return lines


def main(arguments=None):
    """Kills the chosen programs and prints the table; returns the exit status: 1 with findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="number of kills, over all programs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["KILL"], help="signals; TERM,TERM sends one after the other")
    parser.add_argument("--only", nargs="+", choices=[kind.__name__ for kind in WORKS], help="these programs")
    parser.add_argument("--out", type=Path, default=Path("outputs/kills"), help="folder for work and state")
    given = parser.parse_args(arguments)
    kinds = [kind for kind in WORKS if not given.only or kind.__name__ in given.only]
    out = given.out / f"{given.seed}-{'-'.join(given.ways)}"
    (out / "outside").mkdir(parents=True, exist_ok=True)
    place = out / "state.json"
    state = json.loads(place.read_text()) if place.exists() else {}
    share = given.kills / sum(WORKS[kind] for kind in kinds)

    def keep():
        place.with_suffix(".new").write_text(json.dumps(state, indent=1))
        place.with_suffix(".new").replace(place)

    for kind in kinds:
        wanted = max(1, round(share * WORKS[kind]))
        if state.get(kind.__name__, {}).get("kills", 0) < wanted:
            state.get(kind.__name__, {}).pop("over", None)  # more kills than last time
        run(kind, wanted, out, [way.split(",") for way in given.ways], given.seed, state, keep)
    print("\n" + "\n".join(table(state)))
    wrong = [f"{name}: {what}: {one}" for name, found in state.items() for what, one in found["wrong"]]
    print("\n".join(wrong[:40]), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
