"""Convolution as XLA does it."""

import jax
from jax import lax

from sdjax.models.kernels.precision import precision


def convolve(x: jax.Array, kernel: jax.Array, strides: int = 1, pads: tuple = ((1, 1), (1, 1))) -> jax.Array:
    """Returns the convolution of x [B h w in] with kernel [a b in out]."""
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision(x.dtype)
    )
