"""A second process on a folder that one holds, in twenty ways: refused in one line, and the first one is unharmed."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from programs import ROOT

from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.runtime import locks
from sdjax.service import batch, class_images, maker, programs
from sdjax.training import program, run_folder
from sdjax.training.loop import train
from sdjax.training.settings import Train

TOLD = Train(model="random:none", data=Data(path="pocketland"), steps=3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a run's files and pictures, in a current folder of its own."""
    place = tmp_path / "here" / "run"
    (place / "checkpoints" / "1").mkdir(parents=True)
    for name, text in {
        "config.json": json.dumps({"class": "Train"}), "metrics.jsonl": "{}\n", "000001.png": "picture",
        "000001.json": '{"made_from": "x"}', "seeds.txt": "word", "checkpoints/1/state": "numbers",
    }.items():  # fmt: skip
        (place / name).write_text(text)
    (place / "jobs.jsonl").write_text('{"prompt": "a cat"}\n')
    monkeypatch.chdir(tmp_path / "here")
    return place


def content(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def listed(folder, part=(0, 1), usual=None, jobs="jobs.jsonl"):
    held = batch.Folder(maker.Maker(folder / "adapters"), folder)
    return batch.run(held, folder / jobs, usual or {"model": "random:none"}, part=part)


def other_list(folder):
    (folder.parent / "other.jsonl").write_text('{"prompt": "a dog", "name": "000001"}\n')
    return listed(folder, jobs="../other.jsonl")


def linked(folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    train(TOLD, link)


def classes(folder, count=3):
    told = replace(TOLD, class_data=ClassData(path=str(folder), prompts=("a dog",), count=count))
    return class_images.draw(told)


RUNS = {
    "the same settings": lambda folder: train(TOLD, folder),
    "more steps": lambda folder: train(replace(TOLD, steps=9), folder),
    "another model": lambda folder: train(replace(TOLD, model="random:other"), folder),
    "another seed": lambda folder: train(replace(TOLD, seed=7), folder),
    "a relative path": lambda folder: train(TOLD, "run"),
    "a path with ..": lambda folder: train(TOLD, folder / ".." / "run"),
    "a slash at the end": lambda folder: train(TOLD, f"{folder}/"),
    "a link to it": linked,
    "a new short run in its place": run_folder.fresh,
    "class pictures into it": classes,
    "more class pictures into it": lambda folder: classes(folder, 9),
}
LISTS = {
    "the same list": listed,
    "another list": other_list,
    "another model": lambda folder: listed(folder, usual={"model": "random:other"}),
    "a part of it, where all is made": lambda folder: listed(folder, (1, 4)),
    "a relative path": lambda folder: listed(Path("run")),
}


@pytest.mark.parametrize("way", RUNS)
def test_a_run_holds_its_folder(way, folder):
    with locks.held(folder):
        before = content(folder)
        with pytest.raises(ValueError, match=f"pid {os.getpid()} on .* has it .*; wait for its end") as error:
            RUNS[way](folder)
        assert "\n" not in str(error.value) and content(folder) == before
    assert (folder / "checkpoints/1/state").read_text() == "numbers"


@pytest.mark.parametrize("way", LISTS)
def test_a_list_holds_its_folder(way, folder):
    with batch._held(folder, (0, 1)):
        before = content(folder)
        with pytest.raises(ValueError, match="has it|others work there") as error:
            LISTS[way](folder)
        assert "\n" not in str(error.value) and content(folder) == before


def test_parts_of_one_list_share_a_folder(folder):
    with batch._held(folder, (0, 4)), batch._held(folder, (1, 4)):
        for part in ((0, 4), (0, 1), (1, 2)):
            with pytest.raises(ValueError, match="has it|others work there"), batch._held(folder, part):
                pass
    with batch._held(folder, (0, 1)):
        pass
    assert not list(folder.glob("*.lock"))


def test_programs_say_it_in_one_line_and_another_status(folder, capsys):
    recipe = folder.parent / "recipe.py"
    recipe.write_text(
        "from sdjax.data.batches import Data\nfrom sdjax.training.settings import Train\n"
        "def config():\n    return Train(model='random:none', data=Data(path='pocketland'))\n"
    )
    with locks.held(folder):
        assert program.main([str(recipe), f"out={folder}"]) == 1
    with batch._held(folder, (0, 1)):
        assert batch.main("", [str(folder / "jobs.jsonl"), "--out", str(folder)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("error: out=") and "has it" in line for line in said)


HOLD = "import sys; from sdjax.runtime.locks import held\nwith held(sys.argv[1]): print('held', flush=True); input()"


@pytest.mark.parametrize("signal", ["TERM", "KILL", "INT"])
def test_a_dead_ones_folder_is_taken_over(signal, folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"pid {process.pid} on"), locks.held(folder):
        pass
    subprocess.run(["kill", f"-{signal}", str(process.pid)], check=True)
    process.communicate()
    with locks.held(folder):
        pass
    assert not (folder / locks.FILE).exists()


def test_another_machines_folder_stays_its_own(folder):
    signed = {"pid": 1, "host": f"not-{socket.gethostname()}", "command": "train"}
    (folder / locks.FILE).write_text(json.dumps(signed))
    with pytest.raises(ValueError, match="if that is over, remove"):
        train(TOLD, folder)


def test_pictures_of_two_programs_have_numbers_of_their_own(tmp_path, monkeypatch):
    """What is numbered waits for its turn, so that nothing is written over."""
    out = tmp_path / "out"
    out.mkdir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom sdjax.runtime import locks\nfrom sdjax.service import programs\n"
        "out = Path(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    with locks.turn(out):\n"
        "        n = programs._next_number(out)\n"
        "        path = out / f'{n:05d}.png'\n"
        "        assert not path.exists()\n"
        "        path.write_text('x')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    several = [subprocess.Popen([sys.executable, "-c", code, str(out)], env=env) for _ in range(3)]
    assert [one.wait(300) for one in several] == [0, 0, 0]
    assert len(list(out.iterdir())) == 60 and programs._next_number(out) == 60
    assert np.array_equal(sorted(int(path.stem) for path in out.iterdir()), np.arange(60))
