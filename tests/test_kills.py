"""Runs that are killed with SIGKILL again and again, each going on from what the last one left: the same bits.

A short form of one kill is quick: test_buckets.py (buckets, shuffled captions, cache) and test_classes.py (class rows).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from PIL import Image
from programs import ROOT

KILLS, STEPS, CLASSES = 4, 24, 8
ONE = ("--batch", "1")  # class picture at a time
SMALL = [
    "model=random:tiny", "data.size=32", "data.buckets=2", "data.batch=2", "data.shuffle=true", "preview=0",
    "checkpoint=1", "log=1", f"steps={STEPS}",
]  # fmt: skip
RUNS = {
    "lora": ["method.dropout=0.1"],
    # Class pictures share the batches, so that there are no buckets.
    "dreambooth": [
        "data.buckets=0",
        "data.word=sks dog",
        "preserve=0",
        f"class_data.count={CLASSES}",
        "method.pattern=attn2",
        "data.batch=4",
    ],
    "controlnet": ["data.dropout=0.5"],
}


@pytest.fixture
def photos(tmp_path):
    """Five pictures of two shapes with captions of several phrases."""
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(tiny.pictures(5, 64)):
        Image.fromarray(picture[:, :40] if i % 2 else picture).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text("a face, on the beach, at night, smiling")
    return tmp_path / "photos"


class Runs:
    """Processes of one recipe with a cache and class pictures of their own, in one folder."""

    def __init__(self, name, photos, out):
        own = [f"data.path={photos}", f"out={out}", *SMALL, *RUNS[name]]
        own += [f"class_data.path={out}.dogs"] if name == "dreambooth" else []
        own += [f"data.cache={out}.cache"] if name != "controlnet" else []  # whose pictures are shown, not kept
        self.out, self.given, self.name = out, own, name

    def start(self, program="run", *more):
        line = [sys.executable, f"train/{program}.py", f"configs/{self.name}.py", *self.given, *more]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        with open(f"{self.out}.txt", "a") as said:
            return subprocess.Popen(line, cwd=ROOT, env=env, stdout=said, stderr=said)

    def end(self, program="run", *more):
        assert self.start(program, *more).wait(600) == 0, Path(f"{self.out}.txt").read_text()[-2000:]

    def drawn(self):
        """Returns the class pictures by name."""
        return {path.name: path.read_bytes() for path in Path(f"{self.out}.dogs").glob("class-*.png")}

    def kill_drawing(self, after):
        """Kills the drawing of class pictures, one at a time, when some are there; asserts that some are missing."""
        process, end = self.start("class_images", *ONE), time.monotonic() + 300
        while len(self.drawn()) < after and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, Path(f"{self.out}.txt").read_text()[-2000:]
        assert after <= len(self.drawn()) < CLASSES

    def checkpoint(self):
        return max(
            (int(path.name) for path in (self.out / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0
        )

    def kill(self, after, delay):
        """Kills a run that is past a checkpoint; returns the last one that it left."""
        process, end = self.start(), time.monotonic() + 300
        while self.checkpoint() < after and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL, Path(f"{self.out}.txt").read_text()[-2000:]
        return self.checkpoint()

    def losses(self):
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        begun = [line["step"] for line in lines if "event" in line]
        return {line["step"]: line["loss"] for line in lines if "loss" in line}, begun

    def export(self):
        files = sorted((self.out / "export").rglob("*.safetensors"))
        return {str(path.relative_to(self.out).with_stem("x")): tensors(path) for path in files}


def tensors(path):
    """Returns the bytes of a file behind its header, which tells the time and the folder."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_chain_of_killed_runs_ends_in_the_same_bits(name, photos, tmp_path):
    whole, parts, delays = (
        Runs(name, photos, tmp_path / "whole"),
        Runs(name, photos, tmp_path / "parts"),
        random.Random(1),
    )
    if name == "dreambooth":
        parts.kill_drawing(2)
        for runs in (whole, parts):
            runs.end("class_images", *ONE)
        assert len(whole.drawn()) == CLASSES and parts.drawn() == whole.drawn()
    whole.end()
    reached = 0
    for _ in range(KILLS):
        reached = parts.kill(reached + 2, delays.uniform(0, 0.3))
        assert reached < STEPS, "it ended before it was killed"
    parts.end()
    (losses, _), (found, begun) = whole.losses(), parts.losses()
    assert len(begun) == KILLS + 1 and begun == sorted(begun) and begun[-1] > 0
    assert len(losses) == STEPS and found == {step: losses[step] for step in found} and STEPS in found
    assert parts.export() == whole.export() != {}
