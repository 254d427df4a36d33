"""Times each 3x3 convolution of Stable Diffusion 1.5's UNet: our four forms and PyTorch's, in turn.

    python benchmarks/convolutions.py --rounds 5 [--dtype bfloat16]

Prints medians in milliseconds and the rate of the fastest in GFLOP/s, with the FLOPs of a plain convolution.  The
limits in sdjax/models/kernels/convolution.py come from here.  Needs the extra `torch`.
"""

import argparse
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from sdjax.models.kernels import convolution_im2col, convolution_plain, convolution_rows, convolution_winograd

LAYERS = [  # side of the map, channels in, channels out
    (64, 320, 320), (64, 640, 320), (64, 960, 320), (32, 320, 640), (32, 640, 640), (32, 1280, 640), (32, 1920, 640),
    (32, 1280, 1280), (16, 640, 1280), (16, 1280, 1280), (16, 2560, 1280), (8, 1280, 1280), (8, 2560, 1280),
]  # fmt: skip


FORMS = {
    "plain": convolution_plain.convolve, "im2col": convolution_im2col.convolve, "by rows": convolution_rows.convolve,
    "winograd": convolution_winograd.convolve,
}  # fmt: skip


def calls(rows, side, size, features, dtype):
    """Returns {name: a function that runs the layer once}."""
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, side, side, size), np.float32)
    kernel = random.standard_normal((3, 3, size, features), np.float32) / np.float32(3 * size**0.5)
    data, kind = (jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)), getattr(torch, dtype)
    theirs = torch.nn.Conv2d(size, features, 3, padding=1, bias=False).to(kind, memory_format=torch.channels_last)
    seen = torch.tensor(x).permute(0, 3, 1, 2).to(kind)

    @torch.inference_mode()
    def pytorch():
        theirs(seen)

    found = {name: (lambda run=jax.jit(form): run(*data).block_until_ready()) for name, form in FORMS.items()}
    return {**found, "PyTorch": pytorch}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2, help="batch")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the products")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    for side, size, features in LAYERS:
        forms = calls(options.rows, side, size, features, options.dtype)
        times = {name: [] for name in forms}
        for _ in range(options.rounds + 1):  # the first one compiles
            for name, call in forms.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(some[1:]) for name, some in times.items()}
        rate = 2 * 9 * options.rows * side**2 * size * features / min(medians.values()) / 1e9
        shown = ", ".join(f"{name} {1e3 * median:.0f}" for name, median in medians.items())
        print(f"{side}^2, {size} to {features}: {shown} ms; {rate:.0f} GFLOP/s", flush=True)


if __name__ == "__main__":
    main()
