"""3x3 convolution with 16 products for every 2x2 outputs instead of 36.

    y = convolve(x, kernel)        # stride 1, one position of padding on every side

Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1, F(2x2, 3x3).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def convolve(x: Float[Array, "B h w in"], kernel: Float[Array, "3 3 in out"]) -> Float[Array, "B h w out"]:
    """Returns the convolution of x [B h w in] with kernel [3 3 in out], [B h w out]: A^T ((G k G^T) * (B^T d B)) A.

    Every 4x4 tile d of x gives 2x2 outputs; tiles are two positions apart.  There are 16 matrix products over the
    channels, one for each place in a tile; on a CPU they run faster separately than as one batch.
    """
    size, height, width = x.shape[0], *x.shape[1:3]
    down, across = -(-height // 2), -(-width // 2)
    x = jnp.pad(x, ((0, 0), (1, 2 * down - height + 1), (1, 2 * across - width + 1), (0, 0)))
    x = lax.optimization_barrier(x)  # otherwise XLA recomputes x for every tile
    rows = _tile([x[:, i : i + 2 * down - 1 : 2] for i in range(4)])
    tiles = [_tile([row[:, :, j : j + 2 * across - 1 : 2] for j in range(4)]) for row in rows]
    kernels = [_kernel([row[j] for j in range(3)]) for row in _kernel([kernel[i] for i in range(3)])]
    products = [[_product(*pair) for pair in zip(*row, strict=True)] for row in zip(tiles, kernels, strict=True)]
    parts = [_output([row[j] for row in products]) for j in range(4)]  # [column of the tile][row of the output]
    lines = [jnp.stack(_output([part[i] for part in parts]), 3) for i in range(2)]  # [B h/2 w/2 2 out]
    return jnp.stack(lines, 2).reshape(size, 2 * down, 2 * across, -1)[:, :height, :width]


def _tile(d):
    """Returns B^T d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _kernel(k):
    """Returns G k."""
    return [k[0], (k[0] + k[1] + k[2]) / 2, (k[0] - k[1] + k[2]) / 2, k[2]]


def _output(m):
    """Returns A^T m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _product(x, kernel):
    out = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=lax.Precision.HIGHEST)
    return out.reshape(*x.shape[:-1], -1)
