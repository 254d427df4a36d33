"""3x3 convolution as one matrix product of all neighbourhoods, fast on a CPU for small maps with many channels."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.models.kernels.precision import precision


def convolve(x: Float[Array, "B h w in"], kernel: Float[Array, "3 3 in out"]) -> Float[Array, "B h w out"]:
    """Returns the convolution of x [B h w in] with kernel [3 3 in out]; the neighbourhoods are [B h w 9 in]."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)
    return jnp.matmul(x, kernel.reshape(-1, kernel.shape[3]), precision=precision(x.dtype))
