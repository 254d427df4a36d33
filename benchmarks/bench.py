"""Prints a Markdown table of time and memory, a row for each operation that users wait for.

    make bench                                            everything that needs no full-size model
    make bench ARGS=--full                                also SD 1.5 in full size against PyTorch (8 minutes, 12 GB)

Each row runs in a fresh process, so its peak of resident memory is its own.  JAX's cache keeps compiled programs
between runs; the first row of a shape compiles them.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sdjax.runtime import accelerator

ROOT = Path(__file__).parents[1]
RECIPES = {  # methods of the README: recipe, and settings that keep the row short
    "E4T, pre-training, 64 rows": ["configs/pocket/e4t.py", "data.count=512", "data.cache=''"],
    "E4T, one image, 16 rows": ["configs/pocket/tune.py", "data.path=PICTURE", "init=MODEL"],
    "textual inversion, 4 rows": ["configs/textual_inversion.py", "data.path=PICTURE"],
    "full fine-tuning, 4 rows": ["configs/full.py", "data.path=pocketland", "data.count=512"],
    "autoencoder, 8 rows": ["configs/pocket/vae.py", "model=new:pocket", "data.count=512", "data.cache=''"],
    "CLIP, 128 rows": ["configs/pocket/clip.py", "data.count=512", "data.cache=''"],
}


def pictures(model, count):
    """Prints the pictures a second of `count` at a time."""
    from sdjax.formats import pipeline
    from sdjax.runtime import compile_cache
    from sdjax.sampling import generate

    compile_cache.keep()
    sd, count = pipeline.load(model), int(count)

    def timed(first):
        start = time.perf_counter()
        generate.text2img(sd, ["a photo of a face"] * count, seeds=range(first, first + count), steps=20)
        return time.perf_counter() - start

    first, seconds = timed(0), timed(count)
    print(f"{count / seconds:.2f} pictures/s ({first:.1f} s for the first call)")


def training(recipe, *given):
    """Prints the median seconds of a step of a recipe; PICTURE in its settings is a drawn face."""
    from PIL import Image

    from sdjax import settings
    from sdjax.data import pocketland
    from sdjax.runtime import compile_cache
    from sdjax.training.loop import train

    with tempfile.TemporaryDirectory() as out:
        picture = f"{out}/picture.png"
        Image.fromarray(pocketland.draw(pocketland.identity(0), pocketland.scene(0))).save(picture)
        told = [one.replace("PICTURE", picture) for one in given]
        compile_cache.keep(steps=settings.load(recipe, told).steps)  # as train/run.py does
        train(settings.load(recipe, [*told, "steps=9", "log=1", "checkpoint=0", "preview=0"]), out)
        lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    times = [line["seconds"] for line in lines if "loss" in line]
    step = statistics.median(later - earlier for earlier, later in itertools.pairwise(times[1:]))
    print(f"{step:.2f} s a step ({times[0]:.0f} s until the first)")


def rows(options):
    """Returns [(what, command, pattern of the line with the figure)]."""
    python = [sys.executable]
    own = [*python, str(Path(__file__).resolve()), "--row"]
    timed = "import time; t = time.perf_counter(); import sdjax; print(f'{time.perf_counter() - t:.2f} s')"
    found = [
        ("import sdjax", [*python, "-c", timed], r".* s$"),
        (
            "1 picture, 20 steps, guidance",
            [*own, "pictures", options.model, "1"],
            r".*pictures/s.*",
        ),
        (
            "8 pictures, 20 steps, guidance",
            [*own, "pictures", options.model, "8"],
            r".*pictures/s.*",
        ),
        (
            "training a UNet of pocket's size",
            [*python, "benchmarks/train_step.py", "channels=64,96,160", "attention=-cc", "batch=64"],
            r".*images/s.*",
        ),
    ]
    for what, (recipe, *settings) in RECIPES.items():
        given = [one.replace("MODEL", options.model) for one in ("model=MODEL", *settings)]
        found.append((what, [*own, "training", recipe, *given], r".*s a step.*"))
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
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        what, *given = options.row
        {"pictures": pictures, "training": training}[what](*given)
        return 0
    accelerator.check_apart()  # the rows' programs use the device
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, {time.strftime('%Y-%m-%d')}\n\n| what | figure | peak memory |\n| --- | --- | --- |", flush=True)
    failed = 0
    for what, command, pattern in rows(options):
        line, peak = measure(command, pattern)
        failed += line.startswith("failed")
        print(f"| {what} | {line} | {peak / 1e9:.1f} GB |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
