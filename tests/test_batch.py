"""Lists of pictures made: one picture a row, nothing twice, bad rows named, the same pixels after interruptions."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax import load, records, text2img

ROOT = Path(__file__).parents[1]
MODEL = "random:tiny"


def load_program():
    spec = importlib.util.spec_from_file_location("sample_batch", ROOT / "sample" / "batch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


program = load_program()


def write(folder, rows):
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def run(jobs, out, *more):
    return program.main([jobs, "--out", str(out), "--model", MODEL, "--batch", "2", "--steps", "2", *more])


def pictures(out):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path(out).glob("0*.png"))}


def test_rows_become_files_and_a_second_start_makes_nothing(tmp_path, capsys):
    jobs = write(tmp_path, [{"prompt": "a face", "seed": "0-2"}, {"prompt": "a cat"}])
    assert run(jobs, tmp_path / "out", "--plot", "prompt,seed") == 0
    first = pictures(tmp_path / "out")
    assert sorted(first) == [f"000001-0000{i}.png" for i in range(3)] + ["000002.png"]
    assert (tmp_path / "out" / "plot.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*")}
    assert run(jobs, tmp_path / "out") == 0
    assert "0 pictures made, 4 were there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*")}


def test_what_is_missing_or_half_written_comes_back_the_same(tmp_path):
    jobs = write(tmp_path, [{"prompt": "a face", "seed": "0-4"}])
    out = tmp_path / "out"
    run(jobs, out)
    first = pictures(out)
    (out / "000001-00001.png").unlink()
    (out / "000001-00002.json").write_text('{"half')
    (out / "000001-00004.json").unlink()
    run(jobs, out)
    again = pictures(out)
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_files_hold_the_settings_and_say_nothing_private_when_asked(tmp_path):
    given = {"prompt": "my secret", "negative": "a rival", "seed": 4, "sampler": "euler_a", "noise_source": "torch-cpu"}
    jobs = write(tmp_path, [given])
    assert run(jobs, tmp_path / "a") == 0 == run(jobs, tmp_path / "b", "--public", "--format", "webp")
    record = records.read(tmp_path / "a" / "000001.png")
    assert record == records.read(tmp_path / "a" / "000001.json")
    assert (record.prompt, record.seed, record.noise, record.model) == ("my secret", 4, "torch-cpu", MODEL)
    assert records.read(tmp_path / "b" / "000001.webp") == records.public(record)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "b").iterdir())
    assert not any(word in everything for word in (b"secret", b"rival", b"tiny"))
    again = text2img(load(MODEL), **records.settings(record))[0].astype(int)
    assert np.abs(again - pictures(tmp_path / "a")["000001.png"]).max() <= 1  # it was made in a batch of two


def test_other_settings_are_made_anew(tmp_path, capsys):
    run(write(tmp_path, [{"prompt": "a face"}]), tmp_path / "out")
    run(write(tmp_path, [{"prompt": "a cat"}]), tmp_path / "out")
    assert "1 pictures made, 0 were there" in capsys.readouterr().out


def test_bad_rows_are_reported_and_the_others_made(tmp_path, capsys):
    rows = [
        {"prompt": "a face"}, "{broken", {"prompt": "a", "sampler": "fastest"}, {"prompt": "b", "image": "none.png"},
        {"prompt": "c", "image": "../outside.png"}, {"prompt": "a cat"},
    ]  # fmt: skip
    assert run(write(tmp_path, rows), tmp_path / "out") == 1
    assert sorted(pictures(tmp_path / "out")) == ["000001.png", "000006.png"]
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert sorted(error["row"] for error in errors) == [2, 3, 4, 5]
    said = {error["row"]: error["error"] for error in errors}
    assert "sampler='fastest'" in said[3] and "none.png" in said[4] and "lies outside" in said[5]


def test_images_and_masks_of_the_lists_folder(tmp_path):
    sides = (32, 32)
    Image.fromarray(np.full((*sides, 3), 90, np.uint8)).save(tmp_path / "a.png")
    mask = np.zeros(sides, np.uint8)
    mask[:16] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    rows = [
        {"prompt": "a face", "image": "a.png", "strength": 0.5},
        {"prompt": "a face", "image": "a.png", "mask": "m.png"},
    ]
    assert run(write(tmp_path, rows), tmp_path / "out") == 0
    made = pictures(tmp_path / "out")
    assert len(made) == 2 and (made["000002.png"][24:] == 90).all()


def test_parts_divide_the_list(tmp_path):
    jobs = write(tmp_path, [{"prompt": "a face", "seed": "0-4"}])
    for part in ("0/2", "1/2"):
        assert run(jobs, tmp_path / "out", "--part", part) == 0
        assert len(pictures(tmp_path / "out")) == (3 if part == "0/2" else 5)


@pytest.mark.parametrize("more", [["--part", "2/2"], ["--batch", "0"], ["--plot", "colour,seed"]])
def test_bad_flags_are_one_line(tmp_path, capsys, more):
    assert run(write(tmp_path, [{"prompt": "a face"}]), tmp_path / "out", *more) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {more[0]}=")


@pytest.mark.slow
def test_killed_five_times_makes_a_thousand_once_each(tmp_path):
    jobs = write(tmp_path, [{"prompt": ["a face", "a photo of a cat"], "seed": "0-499"}])
    command = [sys.executable, "sample/batch.py", jobs, "--model", "pocket", "--batch", "20", "--steps", "2"]
    chance = random.Random(0)
    for _ in range(5):
        child = subprocess.Popen([*command, "--out", tmp_path / "killed"], cwd=ROOT, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "killed").glob("*.json"))) if (tmp_path / "killed").exists() else 0
        while child.poll() is None and len(list((tmp_path / "killed").glob("*.json"))) < before + 20:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 3))
        assert child.poll() is None, "the run ended before it was killed"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    for out in ("killed", "undisturbed"):
        subprocess.run([*command, "--out", tmp_path / out], cwd=ROOT, check=True)
    killed, undisturbed = (pictures(tmp_path / out) for out in ("killed", "undisturbed"))
    assert len(undisturbed) == 1000 and killed.keys() == undisturbed.keys()
    assert len(list((tmp_path / "killed").glob("*.json"))) == 1000
    assert all(np.array_equal(killed[name], undisturbed[name]) for name in killed)
