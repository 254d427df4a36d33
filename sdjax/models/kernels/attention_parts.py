"""Attention by one head and some queries at a time, so that scores stay in a CPU's cache or fit in memory."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sdjax.models.kernels.attention_plain import weighed


def attend(
    q: Float[Array, "B N heads d"], k: Float[Array, "B M heads d"], v: Float[Array, "B M heads d"], rows: int
) -> Float[Array, "B N heads d"]:
    """Returns attention of q [B N heads d] to k, v [B M heads d], by `rows` queries at a time.

    The backward pass computes the scores again.
    """
    batch, length, heads, size = q.shape
    q, k, v = (x.swapaxes(1, 2).reshape(batch * heads, -1, size) for x in (q, k, v))
    q = jnp.pad(q, ((0, 0), (0, -length % rows), (0, 0))).reshape(batch * heads, -1, rows, size)
    chunk = jax.checkpoint(weighed)
    out = lax.map(lambda qkv: lax.map(lambda part: chunk(part, *qkv[1:]), qkv[0]), (q, k, v))
    return out.reshape(batch, heads, -1, size)[:, :, :length].swapaxes(1, 2)
