"""Precision of products: float32 is exact float32 on every platform; narrower types are summed in float32."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def precision(dtype: DTypeLike) -> lax.Precision | None:
    """Returns the precision of products in a compute type: "highest" for float32, which GPUs and TPUs else round."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def summed(dtype: DTypeLike) -> lax.Precision | lax.DotAlgorithmPreset | None:
    """Returns the precision of products with float32 sums, also for the products of their gradients.

    For bfloat16 it names an algorithm; otherwise a gradient would multiply float32 by bfloat16, which is slow.
    """
    return lax.DotAlgorithmPreset.BF16_BF16_F32 if jnp.dtype(dtype) == jnp.bfloat16 else precision(dtype)
