"""Attention by cuDNN's fused kernel: scores stay on the chip, forward and backward."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities


def attend(
    q: Float[Array, "B N heads d"], k: Float[Array, "B M heads d"], v: Float[Array, "B M heads d"]
) -> Float[Array, "B N heads d"]:
    """Returns attention of q [B N heads d] to k, v [B M heads d]; tracing it needs a CUDA device and cuDNN."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def takes(dtype: DTypeLike, width: int) -> bool:
    """Returns whether this process has CUDA devices whose kernel supports heads of this width and type.

    Source: jax/_src/cudnn/fused_attention_stablehlo.py; cuDNN itself needs Ampere or later.
    """
    found = capability()
    if found is None or found < AMPERE or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return False
    return width % 8 == 0 and width <= (256 if found >= HOPPER else 128)


@functools.cache
def capability() -> tuple[int, int] | None:
    """Returns the lowest compute capability of this process's CUDA devices, such as (9, 0) for Hopper, or None."""
    named = [str(getattr(device, "compute_capability", "")) for device in jax.local_devices()]
    matches = [re.fullmatch(r"(\d+)\.(\d+)", name) for name in named]
    found = [(int(one[1]), int(one[2])) for one in matches if one]
    return min(found, default=None)
