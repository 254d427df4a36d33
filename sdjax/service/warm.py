"""Fills the cache of compiled programs, so that the first picture or step does not wait for the compiler.

    sdjax warm models/sd15 --sizes 512 768 --batches 1 8
    sdjax warm models/sd15 --task controlnet --control lllyasviel/sd-controlnet-canny
    sdjax warm lora data.path=photos/cat data.word=cat            a training run

Draws a step or two of each kind.  Other steps, prompts, seeds, guidance or adapter strengths need no new program.
The options of the task's program, such as --hires 2, work here too.  For a recipe's name or file, it compiles what
a run with these settings compiles, and trains nothing.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdjax.sampling.fields import fields
from sdjax.sampling.latents import size_of
from sdjax.sampling.settings import TASKS
from sdjax.service import flags, programs
from sdjax.training import recipes

# Samplers that draw fresh noise between steps have their own program.
KINDS = {"quiet": "ddim", "noisy": "euler_a"}
# The settings of each task that name pictures; grey ones take the place of the user's.
PICTURES = {"text2img": (), "img2img": ("image",), "inpaint": ("image", "mask"), "controlnet": ("control_image",)}


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    made = argparse.ArgumentParser(
        prog="sdjax warm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("model", help="a model, as for --model of text2img, or a recipe and its settings")
    made.add_argument("--task", choices=PICTURES, default="text2img", help="the program; default: text2img")
    made.add_argument(
        "--sizes", nargs="+", default=[""], help="picture sizes, such as 512 or 512x768; default: the model's"
    )
    made.add_argument("--batches", nargs="+", type=int, default=[1], help="batch sizes; default: 1")
    made.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=["quiet"],
        help="samplers without (quiet) or with (noisy) fresh noise between steps; default: quiet",
    )
    made.add_argument("--dtype", help="data type of weights and computation, as --dtype of text2img")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles each kind, or the programs of a recipe, and prints its seconds; returns the exit status."""
    if arguments and _is_recipe(arguments[0]):
        from sdjax.training.program import warm

        return warm(arguments)
    from sdjax.service.maker import Maker

    options, more = parser().parse_known_args(arguments)
    made_by = Maker()
    try:
        with programs.one_line(), tempfile.TemporaryDirectory() as out:
            for size, batch, kind in itertools.product(options.sizes, options.batches, options.kinds):
                start = time.monotonic()
                given = _given(options, more, size, batch, KINDS[kind], Path(out))
                _draw_pictures(options.task, given, made_by)
                programs.run(options.task, given, made_by)
                what = f"{size or 'own size'}, batch {batch}, {kind}"
                print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)
    except SystemExit as end:
        return end.code  # pyright: ignore[reportReturnType]  # one_line ends with a number
    return 0


def _is_recipe(name):
    """Returns whether a text names a recipe and no model's folder."""
    return name.endswith(".py") or name in recipes.known() and not Path(name).exists()


def _given(options, more, size, batch, sampler, out):
    """Returns the options of the task's program for a step or two of a batch."""
    given = ["--model", options.model, "--prompt", "a photo", "--sampler", sampler]
    given += ["--steps", "1" if options.task == "text2img" else "2"]  # a picture's first steps are left out
    given += ["--count", str(batch), "--batch", str(batch), "--out", str(out), "--seed", "0"]
    given += ["--size", size] if size else []
    given += ["--dtype", options.dtype] if options.dtype else []
    given += [word for name in PICTURES[options.task] for word in (flags.flag(name), str(out / f"{name}.png"))] + more
    return vars(programs.parser(options.task, None, "sdjax warm").parse_args(given))


def _draw_pictures(task, given, made_by):
    """Writes the pictures that a task reads, of the size that is made; the right half of a mask is white."""
    if not PICTURES[task]:
        return
    settings = {name: value for name, value in given.items() if name in fields(TASKS[task])}
    (request,) = programs.asked(task, settings, 1)
    sd, _ = made_by.base(request)
    height, width = size_of(sd, request.settings)
    for name in PICTURES[task]:
        picture = np.full((height, width, 3), 128, np.uint8)
        if name == "mask":
            picture[:] = np.where(np.arange(width) < width // 2, 0, 255)[:, None]
        (file,) = [given[name]] if isinstance(given[name], str) else given[name]
        Image.fromarray(picture).save(file)
