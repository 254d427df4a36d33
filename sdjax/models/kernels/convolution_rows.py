"""3x3 convolution as three matrix products, one per row of the kernel, for processors that multiply bfloat16."""

import functools
from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.models.kernels.precision import precision


def convolve(x: Float[Array, "B h w in"], kernel: Float[Array, "3 3 in out"]) -> Float[Array, "B h w out"]:
    """Returns the convolution of x [B h w in] with kernel [3 3 in out], summed in float32."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, :, j : j + width] for j in range(3)], axis=-1)  # [B h+2 w 3 in]
    kernel = kernel.reshape(3, -1, kernel.shape[3])
    parts = [
        jnp.matmul(x[:, i : i + height], kernel[i], precision=precision(x.dtype), preferred_element_type=jnp.float32)
        for i in range(3)
    ]
    return (parts[0] + parts[1] + parts[2]).astype(x.dtype)


@functools.cache
def matrix_unit() -> bool:
    """Returns whether this processor has instructions for bfloat16 matrix products (AMX), according to Linux."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and "amx_bf16" in path.read_text()
