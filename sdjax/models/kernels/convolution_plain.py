"""XLA's own convolution."""

from jax import lax
from jaxtyping import Array, Float

from sdjax.models.kernels.precision import precision

Pads = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)


def convolve(
    x: Float[Array, "B h w in"], kernel: Float[Array, "a b in out"], strides: int = 1, pads: Pads = ((1, 1), (1, 1))
) -> Float[Array, "B _ _ out"]:
    """Returns the convolution of x [B h w in] with kernel [a b in out]."""
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision(x.dtype)
    )
