"""Turns values that are not finite into an error that names the step, instead of a black picture.

    z, lost = sample(...)                        # lost int32 [B], see diffusion.plan.sample
    z = latents(z, lost, steps, "...")           # ValueError: "latents: not finite from step 3 of 20 on ..."
    pixels = made("pixels", decode(z))

Shapes: B batch.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

A = TypeVar("A", bound=jax.Array | np.ndarray)


def latents(z: jax.Array, lost: jax.Array, steps: int, advice: str) -> jax.Array:
    """Returns the latents z [B ...] if all are finite.

    lost: int32 [B], the first step, counted from 1, after which each was not finite; 0 for none.
    Raises ValueError that names the first such step and ends with `advice`.
    """
    began = np.asarray(lost)
    if began.any():
        where = (
            f"from step {began[began > 0].min()} of {steps} on, in {np.count_nonzero(began)} of {len(began)} pictures"
        )
        raise ValueError(f"latents: not finite {where}; expected {advice}")
    return z


def made(name: str, x: A) -> A:
    """Returns an autoencoder's output x [B ...].  Raises ValueError with its name if it is not finite."""
    lost = np.count_nonzero(~np.asarray(_finite(x)))
    if lost:
        raise ValueError(
            f"{name}: not finite in {lost} of {len(x)} pictures; expected an autoencoder of finite weights"
        )
    return x


@jax.jit
def _finite(x):
    return jnp.isfinite(x).reshape(len(x), -1).all(1)
