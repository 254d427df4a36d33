"""Prints a Markdown table of time and memory, a row for each operation that users wait for.

    make bench                                            everything that needs no full-size model
    make bench ARGS=--full                                also SD 1.5 in full size against PyTorch (8 minutes, 12 GB)

Each row runs in a fresh process, so its peak of resident memory is its own.  JAX's cache keeps compiled programs
between runs; the first row of a shape compiles them.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = """
import sys, time
from sdjax import compiled, generate
from sdjax.convert import pipeline
compiled.keep()
sd, count = pipeline.load(sys.argv[1]), int(sys.argv[2])
make = lambda seed: generate.text2img(sd, ["a photo of a face"] * count, seeds=range(seed, seed + count), steps=20)
start = time.perf_counter(); make(0); first = time.perf_counter() - start
start = time.perf_counter(); make(count); seconds = time.perf_counter() - start
print(f"{count / seconds:.2f} pictures/s ({first:.1f} s for the first call)")
"""
TRAINING = """
import json, pathlib, statistics, sys, tempfile
from PIL import Image
from sdjax import compiled, config
from sdjax.data import pocketland
from sdjax.training.loop import train
with tempfile.TemporaryDirectory() as out:
    picture = f"{out}/picture.png"
    Image.fromarray(pocketland.draw(pocketland.identity(0), pocketland.scene(0))).save(picture)
    given = [one.replace("PICTURE", picture) for one in sys.argv[2:]]
    compiled.keep(steps=config.load(sys.argv[1], given).steps)  # as train/run.py does
    train(config.load(sys.argv[1], [*given, "steps=9", "log=1", "checkpoint=0", "preview=0"]), out)
    lines = [json.loads(line) for line in pathlib.Path(out, "metrics.jsonl").read_text().splitlines()]
times = [line["seconds"] for line in lines if "loss" in line]
step = statistics.median(b - a for a, b in zip(times[1:], times[2:]))
print(f"{step:.2f} s a step ({times[0]:.0f} s until the first)")
"""
RECIPES = {  # methods of the README: recipe, and settings that keep the row short
    "E4T, pre-training, 64 rows": ["configs/pocket/e4t.py", "data.count=512", "data.cache=''"],
    "E4T, one image, 16 rows": ["configs/pocket/tune.py", "data.path=PICTURE", "init=MODEL"],
    "textual inversion, 4 rows": ["configs/textual_inversion.py", "data.path=PICTURE"],
    "full fine-tuning, 4 rows": ["configs/full.py", "data.path=pocketland", "data.count=512"],
    "autoencoder, 8 rows": ["configs/pocket/vae.py", "model=new:pocket", "data.count=512", "data.cache=''"],
    "CLIP, 128 rows": ["configs/pocket/clip.py", "data.count=512", "data.cache=''"],
}


def rows(options):
    """Returns [(what, command, pattern of the line with the figure)]."""
    python = [sys.executable]
    timed = "import time; t = time.perf_counter(); import sdjax; print(f'{time.perf_counter() - t:.2f} s')"
    found = [
        ("import sdjax", [*python, "-c", timed], r".* s$"),
        ("1 picture, 20 steps, guidance", [*python, "-c", PICTURES, options.model, "1"], r".*pictures/s.*"),
        ("8 pictures, 20 steps, guidance", [*python, "-c", PICTURES, options.model, "8"], r".*pictures/s.*"),
        (
            "training a UNet of pocket's size",
            [*python, "benchmarks/train_step.py", "channels=64,96,160", "attention=-cc", "batch=64"],
            r".*images/s.*",
        ),
    ]
    for what, (recipe, *settings) in RECIPES.items():
        given = [one.replace("MODEL", options.model) for one in ("model=MODEL", *settings)]
        found.append((what, [*python, "-c", TRAINING, recipe, *given], r".*s a step.*"))
    if options.full:
        found += [
            ("loading SD 1.5, float16", [*python, "benchmarks/load_memory.py"], r"peak.*"),
            ("SD 1.5's UNet against PyTorch", [*python, "benchmarks/unet.py"], r"medians.*"),
        ]
    return found


def measure(command, pattern):
    """Runs a program; returns (its last line that matches, or its error; its peak of resident memory in bytes)."""
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    lines = [line for line in text.splitlines() if re.fullmatch(pattern, line)]
    if child.returncode or not lines:
        return f"failed: {(text.strip().splitlines() or ['no output'])[-1]}", usage.ru_maxrss * 1024
    return lines[-1], usage.ru_maxrss * 1024


def main():
    """Prints the table and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="what sdjax.load takes")
    parser.add_argument("--full", action="store_true", help="also SD 1.5 in full size")
    options = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, {time.strftime('%Y-%m-%d')}\n\n| what | figure | peak memory |\n| --- | --- | --- |", flush=True)
    failed = 0
    for what, command, pattern in rows(options):
        line, peak = measure(command, pattern)
        failed += line.startswith("failed")
        print(f"| {what} | {line} | {peak / 1e9:.1f} GB |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
