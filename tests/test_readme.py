"""The README's commands, run in its order by a stranger's means: a folder with photos, and small models by its names.

A training run takes two steps.  Left out: what needs a network (`make tune` from a hub id), what ends by a signal
(`make ui`), and what takes minutes or has tests of its own.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image
from programs import ROOT
from test_docs import START

import sdjax

ELSEWHERE = (
    "make bench",
    "make demo",
    "make ui",
    "make install",
    "make pocket",
    "make verify-pytorch",
    "make tune MODEL=CompVis",
)
LINKED = ("configs", "sample", "train")


def commands():
    """Returns the README's commands in its order, those of `make` as the programs that it runs."""
    text = (ROOT / "README.md").read_text()
    found = [
        one.split("  #")[0].strip()
        for one in re.findall(r"^ {4}(\S.*)$|`([^`\n]+)`", text, re.MULTILINE)
        for one in one
    ]
    named = r"sdjax \S+"  # a program's name, no command
    found = [one for one in dict.fromkeys(found) if START.match(one) and not re.fullmatch(named, one)]
    found = [one for one in found if not one.startswith(ELSEWHERE)]
    return [line for one in found for line in (made(one) if one.startswith("make") else [one])]


def made(command):
    """Returns the lines of programs that a command of make runs."""
    line = [*shlex.split(command), *(() if "ARGS=" in command else ("ARGS=",))]
    run = subprocess.run(["make", "-n", *line[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    return [
        one.replace(".venv/bin/", "", 1) for one in run.stdout.splitlines() if re.match(r"\.venv/bin/python \w+/", one)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the README's commands name."""
    folder = tmp_path_factory.mktemp("stranger")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for name in ("photos/cat", "photos/dog", "IMAGES", "outputs/demo"):
        (folder / name).mkdir(parents=True)
    for i, picture in enumerate(tiny.pictures(4, 64)):
        for name in ("photos/cat", "photos/dog", "IMAGES"):
            Image.fromarray(picture).save(folder / name / f"{i}.png")
            (folder / name / f"{i}.txt").write_text("a cat on the beach")
    photo = Image.fromarray(tiny.pictures(1, 64)[0])
    for name in ("outputs/demo/input.png", "photo.png", "cat.png", "face.jpg"):
        photo.save(folder / name)
    photo.resize((16, 16)).save(folder / "small.png")
    photo.convert("L").point(lambda x: 255 * (x > 127)).save(folder / "mask.png")
    photo.save(folder / "edges.png")
    rows = [{"prompt": "a face", "seed": i, "steps": 3} for i in range(2)]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sd, upscaler = sdjax.load("random:tiny"), tiny.model(in_channels=7, num_class_embeds=1000)
    for name in ("lllyasviel", "openai", "stabilityai", "outputs/tune/input"):
        (folder / name).mkdir(parents=True)
    sdjax.save(sdjax.load("pocket"), folder / "FOLDER")
    sdjax.save(sd, folder / "SD15_FOLDER")
    sdjax.save(sd, folder / "v1-5.safetensors", "single-file")
    sdjax.save(upscaler.replace(low_schedule=sd.schedule), folder / "stabilityai" / "stable-diffusion-x4-upscaler")
    (folder / "openai" / "clip-vit-large-patch14").symlink_to(folder / "FOLDER")
    (folder / "outputs" / "tune" / "face").symlink_to(folder / "outputs" / "tune" / "input")  # of the hub's weights
    sdjax.save_control(sdjax.load_control("random:tiny"), folder / "lllyasviel" / "sd-controlnet-canny")
    return folder


def test_there_are_commands():
    assert len(commands()) > 25


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_command_runs(command, place):
    words = [sys.executable, *shlex.split(command.replace("v1-5.safetensors FOLDER", "v1-5.safetensors NEW"))[1:]]
    if "train/run.py" in command:
        if "pocket/tune" not in command:
            shutil.rmtree(place / "outputs" / Path(words[2]).stem, ignore_errors=True)  # an earlier command's
        words.append("steps=2")
    elif "sample/" in command and not re.search("batch|strength", command):
        words += ["--steps", "3"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(words, cwd=place, capture_output=True, text=True, env=env, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
