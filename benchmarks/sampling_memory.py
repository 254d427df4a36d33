"""Prints the memory that one call of a UNet needs besides its weights, by XLA's count; nothing is run.

    python benchmarks/sampling_memory.py sd15 2x64x64 2x96x96        # ROWSxHEIGHTxWIDTH of latents

KEPT of sdjax/sampling/memory.py is the number per latent pixel and channel of the finest map.
"""

import sys

import jax
import jax.numpy as jnp

from sdjax.formats.models import presets
from sdjax.formats.storage import parameters
from sdjax.models.unet import UNet, UNetConfig


def main(name, *sizes):
    """Prints a line per size."""
    config = UNetConfig(**presets.SHAPES[name]["unet"])
    network = UNet(config)
    call = jax.jit(lambda params, *inputs: network.apply({"params": params}, *inputs)[0])
    for size in sizes:
        rows, h, w = map(int, size.split("x"))
        shaped = ((rows, h, w, config.in_channels), (rows,), (rows, 77, config.cross_attention_dim))
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shaped]
        taken = call.lower(parameters.template(network), *inputs).compile().memory_analysis().temp_size_in_bytes
        each = taken / 4 / (rows * h * w * config.block_out_channels[0])
        print(f"{name} {size}: {taken / 1e6:.0f} MB, {each:.1f} numbers per latent pixel and channel")


if __name__ == "__main__":
    main(*sys.argv[1:])
