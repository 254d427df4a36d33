"""Attention in plain XLA operations: all scores at once."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from sdjax.models.kernels.precision import summed


def attend(
    q: Float[Array, "B N heads d"],
    k: Float[Array, "B M heads d"],
    v: Float[Array, "B M heads d"],
    mask: Bool[Array, "#B #heads #N #M"] | None = None,
) -> Float[Array, "B N heads d"]:
    """Returns attention of q [B N heads d] to k, v [B M heads d], [B N heads d]; see kernels/attention.py."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return weighed(q, k, v, mask).swapaxes(1, 2)


def weighed(
    q: Float[Array, "*rows N d"],
    k: Float[Array, "*rows M d"],
    v: Float[Array, "*rows M d"],
    mask: Bool[Array, "*#rows #N #M"] | None = None,
) -> Float[Array, "*rows N d"]:
    """Returns softmax(q k^T / sqrt(d)) v over the last two axes, dividing by the rows' sums last.

    Scores, softmax and the sums of both products are float32 for every type; q, k and the weights are rounded only to
    their own type.
    """
    scale = q.shape[-1] ** -0.5
    wide = q.dtype == jnp.float32  # scaling q is cheaper than scaling scores, but rounds q in a narrower type
    scores = _product(q * scale, k.swapaxes(-1, -2)) if wide else _product(q, k.swapaxes(-1, -2)) * scale
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True))).astype(v.dtype)
    total = weights.sum(-1, keepdims=True, dtype=jnp.float32)  # sums rounded weights, so that they add up to 1
    return (_product(weights, v) / total).astype(v.dtype)


def _product(a, b):
    """Returns the matrix products over the last two axes, float32; this order of axes is fast on a CPU."""
    batch = tuple(range(a.ndim - 2))
    dimensions = (((a.ndim - 1,), (b.ndim - 2,)), (batch, batch))
    return lax.dot_general(a, b, dimensions, precision=summed(a.dtype), preferred_element_type=jnp.float32)
