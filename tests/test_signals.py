"""SIGTERM and Ctrl-C, once and twice: what was whole stays so, one line, the right status, the same bits after."""

import gc
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small_runs
from programs import ROOT

from sdjax import convert
from sdjax.formats.storage import files
from sdjax.runtime import locks, signals
from sdjax.service import batch, maker, records
from sdjax.service.queue import Queue
from sdjax.training import program, run_folder, session
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.loop import train
from tests.serving import Served, wait_for

TERM, INT = signal.SIGTERM, signal.SIGINT
WORK = """
import sys, time
from sdjax.runtime.signals import ended

def work():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("giving up", flush=True)
        time.sleep(float(sys.argv[1]))
        print("given up", flush=True)
    return 0

sys.exit(ended(work, "go on"))
"""


@pytest.mark.parametrize(
    ("sent", "status", "line", "in_order"),
    [
        ([TERM], 143, "stopped; go on", True),
        ([INT], 130, "stopped; go on", True),
        ([TERM, TERM], 143, "stopped; go on", True),
        ([TERM, TERM, TERM], 143, "stopped; go on", True),
        ([INT, TERM], 130, "stopped; go on", True),
        ([INT, INT], 130, "stopped at once; go on", False),
        ([TERM, INT], 130, "stopped at once; go on", False),
    ],
)
def test_once_and_twice(sent, status, line, in_order):
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, "0.3" if in_order else "60"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "begun\n"
    process.send_signal(sent[0])
    assert process.stdout.readline() == "giving up\n"
    for number in sent[1:]:
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err, out) == (status, f"{line}\n", "given up\n" if in_order else "")


@pytest.fixture(autouse=True)
def handlers():
    """Gives back the signals, which `ended` keeps where one came."""
    before = {one: signal.getsignal(one) for one in signals.BOTH}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


class Last:
    def __init__(self):
        self.self = self  # only the garbage collector finds it

    def __del__(self):
        send(INT)


def in_a_finalizer():
    Last()
    gc.collect()


def in_a_callback():
    def once(*_):
        gc.callbacks.remove(once)
        send(INT)

    gc.callbacks.append(once)
    gc.collect()


@pytest.mark.parametrize("come", [in_a_finalizer, in_a_callback])
def test_a_signal_where_python_ignores_exceptions_is_not_lost(come, capsys):
    hook = sys.unraisablehook

    def work():
        come()
        time.sleep(5)
        return 0

    assert signals.ended(work, "go on") == 130 and capsys.readouterr().err == "stopped; go on\n"
    assert sys.unraisablehook is hook


def test_nothing_is_left_behind(handlers):
    before = signal.getsignal(INT)
    assert signals.ended(lambda: 7, "") == 7 and signal.getsignal(INT) is before


# ---- training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return small_runs.settings(tmp_path_factory.mktemp("told") / "photos")


@pytest.fixture(scope="module")
def whole(told, tmp_path_factory):
    """The export of a run that nothing stopped."""
    return small_runs.whole(told, tmp_path_factory.mktemp("whole") / "run")


def started(told, out, capsys):
    """Runs the training program; returns its status and its lines on stderr."""
    capsys.readouterr()
    recipe = small_runs.recipe(told, out.parent)
    status = program.main([str(recipe), f"out={out}"])
    return status, [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_that_is_stopped_between_steps(times, told, whole, tmp_path, monkeypatch):
    """A SIGTERM after step 1; with two, the second comes while the checkpoint of step 2 is written."""
    out, save, after = tmp_path / "run", Checkpoints.save, session.Session.after
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "after", lambda *a: (send(TERM) if a[1] == 2 else None, after(*a))[1])
        patch.setattr(Checkpoints, "save", lambda *a, **how: (send(*[TERM] * (times - 1)), save(*a, **how))[1])
        with pytest.raises(SystemExit) as end:
            train(told, out)
    assert end.value.code == 143 and small_runs.checkpoints(out) == [2, 3] and not (out / "export").exists()
    assert not (out / locks.FILE).exists()
    train(told, out)
    assert small_runs.weights(out) == whole and small_runs.logged(out) == [1, 2, 3, 4]


def test_a_signal_during_the_export(told, whole, tmp_path, monkeypatch, capsys):
    """Ctrl-C gives the export up, SIGTERM, once or twice, lets it end: the run is over."""
    out, export = tmp_path / "run", run_folder.export
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "rehearse", lambda *a: None)
        patch.setattr(files, "write_safetensors", lambda *a: send(INT))
        assert started(told, out, capsys) == (
            130, ["stopped; rerun the command to resume from the newest checkpoint"],
        )  # fmt: skip
    assert (
        small_runs.checkpoints(out) == [2, 4]
        and not list(out.rglob("*.safetensors"))
        and not list(out.rglob(".*saving*"))
    )
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "export", lambda *a, **how: (send(TERM, TERM), export(*a, **how))[1])
        assert started(told, out, capsys) == (0, [])
    assert small_runs.weights(out) == whole


def test_a_signal_before_the_first_step(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sdjax.training.ready.begin", lambda *a, **how: send(TERM))
    said = "stopped; rerun the command to resume from the newest checkpoint"
    assert started(told, tmp_path / "run", capsys) == (143, [said])
    assert not (tmp_path / "run").exists()


# ---- lists and conversions ---------------------------------------------------------------------


@pytest.mark.parametrize("sent", [[TERM], pytest.param([TERM, TERM], marks=pytest.mark.slow), [INT]])
def test_a_list_that_is_stopped(sent, tmp_path, monkeypatch, capsys):
    """At the third picture, one row is wrong: what is made stays, errors.jsonl too, and the next start goes on."""
    jobs, out, made = tmp_path / "jobs.jsonl", tmp_path / "out", []
    rows = [{"prompt": f"a cat {i}"} for i in range(4)] + [{"prompt": "a", "steps": -1}]
    jobs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Drawn(maker.Maker):
        def make(self, requests, **more):
            made.append(requests[0].name)
            if len(made) == 3 and sent:
                send(*sent)
            return np.zeros((len(requests), 16, 16, 3), np.uint8)

        def record(self, request, size, private=True, **more):
            return records.of(request.settings, size)

    monkeypatch.setattr(maker, "Maker", Drawn)
    monkeypatch.setattr("sdjax.runtime.compile_cache.keep", lambda **_: None)
    given = [str(jobs), "--out", str(out), "--model", "random:tiny", "--batch", "1"]
    assert batch.main("", given) == 128 + sent[0]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("stopped", "Traceback"))]
    assert said == ["stopped; 2 pictures made; start again to go on"]
    assert len(list(out.glob("*.png"))) == 2 and len((out / "errors.jsonl").read_text().splitlines()) == 1
    assert not list(out.glob("*.lock")) and not list(out.glob(".*"))
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    made[:] = [None] * 9
    assert batch.main("", given) == 1 and len(made) == 11
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}.items()


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_a_conversion_that_is_stopped(name, tmp_path, monkeypatch, capsys):
    """What was there before is unchanged, and nothing is left beside it."""
    place, write = tmp_path / name, files.write_safetensors
    assert convert.main(["random:tiny", str(place)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(files, "write_safetensors", lambda *a: (write(*a), send(TERM))[0])
    capsys.readouterr()
    assert convert.main(["random:tiny", str(place), "--dtype", "float16"]) == 143
    assert capsys.readouterr().err == f"stopped; {place} is whole, or as it was\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- the server --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sent", [[TERM], [INT], [TERM, TERM], [INT, INT]], ids=lambda sent: str(len(sent)))
def test_a_server_that_is_stopped_at_work(sent, tmp_path):
    """The job waits for the next start, which makes its picture; with two, the second comes while the worker ends."""
    served = Served(tmp_path / "ui").start()
    try:
        job = served.client().submit(prompt="a cat", seed=3, steps=60, size="64x64")
        queue = Queue(served.out / "queue.db")
        wait_for(lambda: queue.get(job["id"]).step > 2, 240)
        served.process.send_signal(sent[0])
        for number in sent[1:]:
            wait_for(lambda: queue.option("server") == 0, 30)
            served.process.send_signal(number)
        status, said = served.process.wait(60), served.log.read_text().split("stops the server\n")[1]
        assert (status, said) in [(0, ""), (130, "stopped at once; jobs wait for the next start\n")] and (
            status == 0 or sent == [INT, INT]
        ), (status, said)
        served.start()
        wait_for(lambda: queue.get(job["id"]).over, 240)
        assert queue.get(job["id"]).state == "done" and len(list((served.out / "pictures").iterdir())) == 1
    finally:
        assert served.stop() == 0
