"""Noise for training, from one key per example, so it does not depend on batch, device or process.

noise = normal(keys, z.shape[1:])                                    # [B h w c]
noise = pyramid(noise, trees.example_keys(other, index), 0.4)        # with coarse noise
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

LEVELS = 6  # levels of coarse noise, as in Whitaker's first version and kohya's default


def normal(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float32[Array, "B ..."]:
    """Returns one standard normal array per key, float32 [B *shape]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def pyramid(
    noise: Float[Array, "B h w c"], keys: Key[Array, " B"], discount: float, levels: int = LEVELS
) -> Float32[Array, "B h w c"]:
    """Returns noise [B h w c] plus discount^i times noise at 1 / 2^i of the resolution, scaled to unit variance.

    i = 1, 2, ..., up to `levels` or a side of 1.  Coarse noise is enlarged bilinearly.  Models learn brightness and
    large shapes better from it; use a discount of 0.2 to 0.4.
    Source: Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training".  Our choices: each level halves the
    sides, so shapes are static (the source shrinks by a random factor of 2 to 4).  Each example is divided by its own
    standard deviation instead of the batch's.
    """
    height, width, channels = noise.shape[1:]
    total = noise.astype(jnp.float32)
    for i in range(1, levels + 1):
        size = max(1, height >> i), max(1, width >> i)
        coarse = normal(jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys), (*size, channels))
        total += discount**i * jax.image.resize(coarse, noise.shape, "bilinear")
        if min(size) == 1:
            break
    return total / jnp.std(total, (1, 2, 3), keepdims=True)
