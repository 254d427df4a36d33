"""Fills the cache of compiled programs, so that the first picture does not wait for the compiler.

    sdjax warm models/sd15 --sizes 512 768 --batches 1 8

Draws one step of each kind.  Other steps, prompts, seeds, guidance or adapter strengths need no new program.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence

from sdjax.service import programs

# Samplers that draw fresh noise between steps have their own program.
KINDS = {"quiet": "ddim", "noisy": "euler_a"}


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    made = argparse.ArgumentParser(
        prog="sdjax warm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("model", help="a model, as for --model of text2img")
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
    """Compiles each kind and prints its seconds; returns the exit status."""
    from sdjax.service.maker import Maker

    options, made_by = parser().parse_args(arguments), Maker()
    try:
        with programs.one_line(), tempfile.TemporaryDirectory() as out:
            for size, batch, kind in itertools.product(options.sizes, options.batches, options.kinds):
                start = time.monotonic()
                programs.run("text2img", _given(options, size, batch, KINDS[kind], out), made_by)
                what = f"{size or 'own size'}, batch {batch}, {kind}"
                print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)
    except SystemExit as end:
        return end.code  # pyright: ignore[reportReturnType]  # one_line ends with a number
    return 0


def _given(options, size, batch, sampler, out):
    """Returns the options of text2img for one step of a batch."""
    given = ["--model", options.model, "--prompt", "a photo", "--steps", "1", "--sampler", sampler]
    given += ["--count", str(batch), "--batch", str(batch), "--out", out, "--seed", "0"]
    given += ["--size", size] if size else []
    given += ["--dtype", options.dtype] if options.dtype else []
    return vars(programs.parser("text2img", None).parse_args(given))
