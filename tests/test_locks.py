"""A folder has one process at a time: who is refused, what is said, and what dead processes leave."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from programs import ROOT

from sdjax.data.batches import Data
from sdjax.runtime import locks
from sdjax.training.loop import train
from sdjax.training.run_folder import fresh
from sdjax.training.settings import Train

HOLDER = """
import sys
from sdjax.runtime.locks import held
sys.stdin.readline()  # all at once
try:
    with held(sys.argv[1]):
        print("has it", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


def start(folder):
    """Returns a process that takes a folder when it is told to, and holds it until it is told again."""
    command, env = [sys.executable, "-c", HOLDER, str(folder)], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


def tell(process):
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process):
    return process.stdout.readline().strip()


def end(*processes):
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / "run"."""
    process = start(tmp_path / "run")
    tell(process)
    assert answer(process) == "has it"
    yield process
    end(process)


def test_the_second_is_told_who_has_it(holder, tmp_path):
    second = start(tmp_path / "run")
    tell(second)
    line = answer(second)
    assert line.startswith(f"out='{tmp_path / 'run'}': pid {holder.pid} on {socket.gethostname()} has it (")
    assert "python" in line and "import sys from sdjax" in line
    assert line.endswith("wait for its end, or choose another")
    tell(holder)
    holder.wait()
    assert not (tmp_path / "run").exists()  # made for the lock alone
    end(second)


def test_what_a_killed_process_left_is_taken_over(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    left = tmp_path / "run" / locks.FILE
    assert json.loads(left.read_text())["pid"] == holder.pid
    with locks.held(tmp_path / "run"):
        assert json.loads(left.read_text())["pid"] == os.getpid()
    assert not left.exists() and (tmp_path / "run").is_dir()  # not made here


@pytest.mark.parametrize("left", [False, True])
def test_of_several_at_once_one_wins(tmp_path, left):
    if left:
        gone = subprocess.Popen(["true"])
        gone.wait()
        signed = {"pid": gone.pid, "host": socket.gethostname(), "command": "train"}
        (tmp_path / locks.FILE).write_text(json.dumps(signed))
    takers = [start(tmp_path) for _ in range(6)]
    for taker in takers:
        tell(taker)
    answers = {taker.pid: answer(taker) for taker in takers}
    end(*takers)
    (winner,) = (pid for pid, line in answers.items() if line == "has it")
    assert all(f"pid {winner} on" in line for pid, line in answers.items() if pid != winner)


def test_a_file_that_came_and_went_between_is_no_lock(tmp_path, monkeypatch):
    """The holder ends, and removes its file, after another process has opened it: a lock on that is on nothing."""
    path, opened = tmp_path / locks.FILE, []

    def late(descriptor, how):
        opened.append(descriptor)
        if len(opened) == 1:
            path.unlink()

    path.touch()
    monkeypatch.setattr(fcntl, "flock", late)
    with locks.held(tmp_path):
        assert len(opened) == 2 and json.loads(path.read_text())["pid"] == os.getpid()


def test_what_another_host_left_is_refused(tmp_path):
    signed = {"pid": 1, "host": "elsewhere", "command": "python train/run.py"}
    (tmp_path / locks.FILE).write_text(json.dumps(signed))
    message = f"pid 1 on elsewhere has it .python train/run.py.; if that is over, remove {tmp_path / locks.FILE}"
    with pytest.raises(ValueError, match=message), locks.held(tmp_path):
        pass
    assert json.loads((tmp_path / locks.FILE).read_text()) == signed


def test_without_flock_only_a_new_file_is_a_lock(tmp_path, monkeypatch):
    def none(descriptor, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        locks.held(tmp_path),
        pytest.raises(ValueError, match=f"pid {os.getpid()} on .*; if that is over, remove"),
        locks.held(tmp_path),
    ):
        pass
    assert not (tmp_path / locks.FILE).exists()
    with locks.held(tmp_path):
        pass


def test_no_run_starts_in_a_folder_that_one_has(holder, tmp_path):
    with pytest.raises(ValueError, match=f"run': pid {holder.pid} on"):
        train(
            Train(model="random:none", data=Data(path="pocketland")), tmp_path / "run"
        )  # not even a model is looked for
    assert [path.name for path in (tmp_path / "run").iterdir()] == [locks.FILE]
    tell(holder)
    holder.wait()
    with pytest.raises(ValueError, match="random:none"):
        train(Train(model="random:none", data=Data(path="pocketland")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_is_not_removed(holder, tmp_path):
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps({"class": "Train"}))
    with pytest.raises(ValueError, match=f"run': pid {holder.pid} on"):
        fresh(tmp_path / "run")
    assert config.is_file()
    end(holder)
    assert not fresh(tmp_path / "run").exists()
