"""Measures images per second of training a small UNet on 16x16 latents on a CPU: value_and_grad and AdamW.

python benchmarks/train_step.py channels=64,128,192 layers=1 batch=32 steps=5
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax import trees
from sdjax.models.unet import UNet, UNetConfig


def small(channels, layers, attention, context=192, heads=32):
    """Returns a small UNet's config; attention: a letter per level, finest first: c for cross-attention, - for none."""
    return UNetConfig(
        sample_size=16,
        down_block_types=tuple("CrossAttnDownBlock2D" if a == "c" else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a == "c" else "UpBlock2D" for a in reversed(attention)),
        block_out_channels=channels,
        layers_per_block=layers,
        attention_head_dim=tuple(width // heads for width in channels),
        cross_attention_dim=context,
        norm_num_groups=16,
    )


def lowered(config, batch, dtype=jnp.float32, tokens=32):
    """Returns (one AdamW step, lowered; its state; its data)."""
    unet, optimizer = UNet(config, dtype), optax.adamw(1e-4)
    keys = jax.random.split(jax.random.key(0), 4)
    z = jax.random.normal(keys[0], (batch, 16, 16, 4))
    data = (z, jnp.arange(batch), jax.random.normal(keys[1], (batch, tokens, config.cross_attention_dim)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.prod(leaf.shape[:-1] or (1,)) ** 0.5),
        jax.eval_shape(unet.init, keys[2], *data)["params"],
    )

    def loss(params, data):
        return jnp.square(unet.apply({"params": params}, *data)[0] - data[0]).mean()

    def step(state, data):
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params, data)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = (params, jax.jit(optimizer.init)(params))
    return jax.jit(step, donate_argnums=0).lower(state, data), state, data


def step_of(config, batch, dtype=jnp.float32):
    """Returns (compiled step, state, data)."""
    step, state, data = lowered(config, batch, dtype)
    return step.compile(), state, data


def measure(config, batch, steps=5, dtype=jnp.float32):
    """Returns (images per second of the fastest and the median step, parameters in millions, seconds to compile)."""
    start = time.perf_counter()
    step, state, data = step_of(config, batch, dtype)
    compiled, times = time.perf_counter() - start, []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, value = step(state, data)
        value.block_until_ready()
        times.append(time.perf_counter() - start)
    times = sorted(times[1:])
    return batch / times[0], batch / times[len(times) // 2], trees.count(state[0]) / 1e6, compiled


def main(arguments):
    options = {"channels": "64,128,192", "layers": "1", "attention": "", "batch": "32", "steps": "5"}
    options |= {"dtype": "float32"} | dict(argument.split("=") for argument in arguments)
    channels = tuple(int(x) for x in options["channels"].split(","))
    attention = options["attention"] or "c" * len(channels)
    config = small(channels, int(options["layers"]), attention)
    best, median, size, compiled = measure(config, int(options["batch"]), int(options["steps"]), options["dtype"])
    print(
        f"{options['channels']} layers {options['layers']} attention {attention} batch {options['batch']}: "
        f"{best:.1f} images/s at best, {median:.1f} median; {size:.2f} M parameters; compiled in {compiled:.0f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
