"""Counts StableHLO operations and loops of Stable Diffusion 1.5's programs on each platform, and times lowering.

    python benchmarks/lowering.py [--rows 8] [--dtype float32] [--platforms cpu cuda tpu]

The programs are sampling (50 steps, guidance) and the tuning step of configs/e4t_tune.py.  Shapes are enough: there are
no weights, nothing is compiled or run, and the machine needs none of the platforms.  Without a CUDA device, "cuda" is
the plain branch, without cuDNN's kernel.  Seconds are processor seconds of this process.
"""

import argparse
import gc
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import shapes

from sdjax import settings
from sdjax.diffusion.plan import sample, tabulate
from sdjax.diffusion.wrappers import Guidance
from sdjax.models.cond import Cond, UNetInputs

SIZE, LENGTH = 512, 77  # pixels, tokens
S = jax.ShapeDtypeStruct


def sampling(rows, dtype):
    """Returns (function, arguments) of sampling `rows` pictures."""
    sd = shapes.load("random:sd15", dtype)
    plan = tabulate(sd.schedule, "ddim", 50)
    words = {"text_encoder": {"ids": S((rows, LENGTH), jnp.int32)}}
    text = Cond(UNetInputs(S((rows, LENGTH, 768), jnp.dtype(dtype))), words=words)

    def run(sd, cond, negative, start, plan):
        guided = sd.add(wrappers=Guidance(7.5, negative))
        return sample(lambda z, t, i: guided.denoise(z, t, cond, i)[0], start, plan)[0]

    return jax.jit(run), (sd.bare, text, text, S((rows, SIZE // 8, SIZE // 8, 4), jnp.float32), plan)


def tuning(rows):
    """Returns (function, arguments) of an E4T tuning step on `rows` copies of one picture."""
    given = ["model=random:sd15", "vision=random:vit-h", f"data.batch={rows}", "data.path=photo.png"]
    train = settings.load("configs/e4t_tune.py", [*given, *shapes.GIVEN["e4t_tune"]])
    function, arguments, *_ = shapes.program(train)
    return jax.jit(function, donate_argnums=0), arguments


def operations(text):
    """Returns the number of operations in a program's text; a function counts once, however often it is called."""
    return len(re.findall(r"= \"?(?:stablehlo|chlo)\.", text))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="pictures; the tuning step has twice as many")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type of sampling")
    parser.add_argument("--platforms", nargs="+", default=["cpu", "cuda", "tpu"], help="platforms to lower for")
    options = parser.parse_args()
    programs = {
        "sampling": lambda: sampling(options.rows, options.dtype),
        "E4T tuning step": lambda: tuning(2 * options.rows),
    }
    for name, make in programs.items():
        run, arguments = make()
        for platform in options.platforms:
            jax.clear_caches()
            gc.collect()
            start = time.process_time()
            traced = run.trace(*arguments)
            middle = time.process_time()
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            seconds = np.diff([start, middle, time.process_time()])
            counted, loops = operations(text), text.count("stablehlo.while")
            print(
                f"{name}, {platform}: {counted} operations, {loops} loops; "
                f"traced in {seconds[0]:.1f} s, lowered in {seconds[1]:.1f} s", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
