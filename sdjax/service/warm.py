"""Fills the cache of compiled programs, so that the first picture need not wait for the compiler.

    sdjax warm models/sd15 --sizes 512 768 --batches 1 8

Draws one step of each kind: another number of steps, prompt, seed, guidance or adapter's strength compiles nothing.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence

from sdjax.service import programs

KINDS = {
    "quiet": "ddim",
    "noisy": "euler_a",
}  # samplers that draw fresh noise between steps have a program of their own


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    made = argparse.ArgumentParser(
        prog="sdjax warm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("model", help="a model, as --model of text2img")
    made.add_argument("--sizes", nargs="+", default=[""], help="512 or 512x768; default: the model's")
    made.add_argument("--batches", nargs="+", type=int, default=[1], help="pictures at once; default: 1")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=["quiet"], help="of samplers; default: quiet")
    made.add_argument("--dtype", help="type of weights and computation, as --dtype of text2img")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles and says the seconds of each kind; returns the exit status."""
    options = parser().parse_args(arguments)
    for size in options.sizes:
        for batch in options.batches:
            for kind in options.kinds:
                start = time.monotonic()
                if status := _draw(options, size, batch, KINDS[kind]):
                    return status
                what = f"{size or 'own size'}, batch {batch}, {kind}"
                print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)
    return 0


def _draw(options, size, batch, sampler):
    """Draws a batch of one step as text2img does; returns its exit status."""
    with tempfile.TemporaryDirectory() as out:
        given = ["--model", options.model, "--prompt", "a photo", "--steps", "1", "--sampler", sampler]
        given += ["--count", str(batch), "--batch", str(batch), "--out", out, "--seed", "0"]
        given += ["--size", size] if size else []
        given += ["--dtype", options.dtype] if options.dtype else []
        return programs.main("text2img", None, given)


if __name__ == "__main__":
    sys.exit(main())
