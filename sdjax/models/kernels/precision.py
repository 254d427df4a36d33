"""How exactly products are made: float32 is float32 on every platform, narrower types are summed in float32."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def precision(dtype: DTypeLike) -> lax.Precision | None:
    """Returns the precision of products in a compute type: "highest" for float32 (GPUs and TPUs round it otherwise)."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def summed(dtype: DTypeLike) -> lax.Precision | lax.DotAlgorithmPreset | None:
    """Returns the precision of products whose sums are wanted in float32, their gradients' products included.

    For bfloat16 it is named as an algorithm: else a gradient would multiply float32 by bfloat16, which is slow.
    """
    return lax.DotAlgorithmPreset.BF16_BF16_F32 if jnp.dtype(dtype) == jnp.bfloat16 else precision(dtype)
