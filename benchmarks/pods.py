"""Tests runs in several processes on this machine's CPU: equal losses on every layout, and resuming after kills.

    python benchmarks/pods.py law [NAME ...] --out outputs/pods
    python benchmarks/pods.py kills --times 20 --out outputs/pods

law: compares the losses of ten steps on each of LAYOUTS with one device's; they must agree to 5 digits.
kills: one of four processes gets SIGKILL at a random step.  The others must fail within a minute; the JSON file has
their last lines.  The same command with four processes must then end with the bits of an undisturbed run.  With two
processes, a copy of the folder must end with the same losses to 5 digits.
Both write a JSON file; a rerun of `kills` resumes.
"""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = "benchmarks/pods_recipe.py"
LAYOUTS = {  # name: (processes, devices of each, parallel)
    "single": (1, 1, "single"),
    "mesh 1x4": (1, 4, "mesh:data=1,fsdp=4"),
    "mesh 2x2": (1, 4, "mesh:data=2,fsdp=2"),
    "data x fsdp x tensor": (1, 8, "mesh:data=2,fsdp=2,tensor=2"),
    "pmap 4": (1, 4, "pmap"),
    "2 processes x 2 devices": (2, 2, "mesh:data=2,fsdp=2"),
    "2 processes, tensor across": (2, 2, "mesh:fsdp=2,tensor=2"),
    "4 processes": (4, 1, "mesh:data=2,fsdp=2"),
}
DIGITS = 1e-5  # largest relative difference of two losses that agree to 5 digits
MINUTE, PATIENCE = 60, 600  # seconds
STEPS, EVERY = 12, 3  # steps of a killed run, and between its checkpoints


def start(processes, devices, arguments, out):
    """Starts a run in several processes and returns them; the output of process i goes to OUT.I.txt."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "device_count" not in flag]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    kept += ["--xla_cpu_collective_call_terminate_timeout_seconds=600"]  # this machine may be busy
    env["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
    line = [sys.executable, "train/run.py", RECIPE, f"out={out}", *arguments]
    joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    started = []
    for i in range(processes):
        own = {**env, **joined, "JAX_PROCESS_ID": str(i)} if processes > 1 else env
        with open(f"{out}.{i}.txt", "w") as said:
            started.append(subprocess.Popen(line, cwd=ROOT, env=own, stdout=said, stderr=said))
    return started


def said(out, i):
    """Returns the output lines of process i since the last start."""
    text = Path(f"{out}.{i}.txt").read_text(errors="replace")
    return [line for line in text.replace("\r", "\n").splitlines() if line.strip()]


def end(started, out):
    """Waits for all processes of a run; raises RuntimeError with the last lines of one that fails."""
    for i, process in enumerate(started):
        if process.wait(PATIENCE):
            raise RuntimeError(f"process {i} ended with {process.returncode}: {' / '.join(said(out, i)[-12:])}")


def losses(out):
    """Returns the losses {step: loss} of a run's metrics."""
    path = Path(out) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def difference(one, other):
    """Returns the largest relative difference of two {step: loss}; infinity if `one` lacks a step of `other`."""
    return max((abs(one[n] - other[n]) / abs(other[n]) if n in one else float("inf") for n in other), default=0.0)


def train(name, out, *more):
    """Runs the recipe on a layout in a fresh folder; returns {step: loss}."""
    processes, devices, parallel = LAYOUTS[name]
    shutil.rmtree(out, ignore_errors=True)
    end(start(processes, devices, [f"parallel={parallel}", *more], out), out)
    return losses(out)


def law(names, folder, *more):
    """Returns {layout: largest relative difference from the losses of one device}."""
    wanted = train("single", folder / "single", *more)
    found = {}
    for name in names:
        made = train(name, folder / name.replace(" ", "-").replace(",", ""), *more)
        found[name] = difference(made, wanted)
        print(f"{name:28s} {found[name]:.1e} over {len(made)} steps", flush=True)
    return found


def sums(out, step):
    """Returns the checksums of a checkpoint's leaves; equal checksums mean equal bits."""
    return json.loads((Path(out) / "checkpoints" / str(step) / "meta" / "metadata").read_text())["sums"]


def arguments(parallel):
    return [f"parallel={parallel}", f"steps={STEPS}", f"checkpoint={EVERY}", "keep=20"]


def kill(folder, number, wanted):
    """Kills one of four processes; returns an entry of kills.json.

    wanted: ({step: loss}, sums) of the undisturbed run.
    """
    draw, out, two = random.Random(number), folder / f"kill-{number}", folder / f"kill-{number}-two"
    for path in (out, two):
        shutil.rmtree(path, ignore_errors=True)
    processes, devices, parallel = LAYOUTS["4 processes"]
    victim, after = draw.randrange(processes), draw.randrange(EVERY + 1, STEPS - 1)
    started, until = start(processes, devices, arguments(parallel), out), time.monotonic() + PATIENCE
    while max(losses(out), default=0) < after and time.monotonic() < until and started[victim].poll() is None:
        time.sleep(0.01)
    time.sleep(draw.random() / 2)
    started[victim].kill()
    killed = time.monotonic()
    others = [i for i in range(processes) if i != victim]
    statuses = [started[i].wait(PATIENCE) for i in others]
    seconds = time.monotonic() - killed
    last = [said(out, i)[-1] for i in others]
    shutil.copytree(out, two)
    end(start(processes, devices, arguments(parallel), out), out)
    end(start(2, 1, arguments("mesh:data=2"), two), two)
    return {
        "victim": victim, "at": after, "seconds": round(seconds, 1), "statuses": statuses, "said": last,
        "bits": sums(out, STEPS) == wanted[1], "losses": difference(losses(two), wanted[0]),
    }  # fmt: skip


def kills(folder, times):
    """Returns an entry for each kill; it keeps the entries of earlier starts."""
    place = folder / "kills.json"
    found = json.loads(place.read_text()) if place.is_file() else []
    whole = folder / "whole"
    if not (whole / "export").is_dir():
        shutil.rmtree(whole, ignore_errors=True)
        end(start(4, 1, arguments(LAYOUTS["4 processes"][2]), whole), whole)
    wanted = losses(whole), sums(whole, STEPS)
    while len(found) < times:
        found.append(kill(folder, len(found), wanted))
        place.write_text(json.dumps(found, indent=1))
        print(json.dumps(found[-1]), flush=True)
    return found


def passed(found):
    """Returns whether everything went right after a kill."""
    quick = found["seconds"] <= MINUTE and all(found["statuses"])
    return quick and found["bits"] and found["losses"] <= DIGITS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("law", "kills"))
    parser.add_argument("layouts", nargs="*", help="law: names of LAYOUTS; default: all but the first")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--out", default="outputs/pods")
    given = parser.parse_args()
    folder = Path(given.out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if given.what == "law":
        found = law(given.layouts or list(LAYOUTS)[1:], folder)
        (folder / "law.json").write_text(json.dumps(found, indent=1))
        return int(max(found.values()) > DIGITS)
    found = kills(folder, given.times)
    good = sum(map(passed, found))
    print(f"{good} of {len(found)} went on to the same bits; others ended after {max(x['seconds'] for x in found)} s")
    return int(good < len(found))


if __name__ == "__main__":
    sys.exit(main())
