"""Attention, by the way that suits its shape and the platform that it is lowered for.

    y = attend(q, k, v)        # [B N heads d], [B M heads d], [B M heads d] -> [B N heads d]

Ways, one file each: attention_plain (all scores at once), attention_parts (some of them at a time) and attention_cudnn
(NVIDIA's fused kernel).  docs/devices.md says which is taken where.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Bool, Float

from sdjax.models.kernels import attention_cudnn, attention_parts, attention_plain

SCORES_AT_ONCE = 1 << 31  # bytes of scores from which on they are made in parts on every platform
CACHED = 512 * 512  # scores of one head from which on a CPU is faster with parts

Heads = Float[Array, "B _ heads d"] | jax.ShapeDtypeStruct

cached = functools.partial(attention_parts.attend, rows=512)
fitting = functools.partial(attention_parts.attend, rows=2048)


def attend(
    q: Float[Array, "B N heads d"],
    k: Float[Array, "B M heads d"],
    v: Float[Array, "B M heads d"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "B N heads d"]:
    """Returns multi-head attention softmax(q k^T / sqrt(d)) v, [B N heads d], with scores and sums in float32.

    q: [B N heads d].  k, v: [B M heads d].  mask: boolean, broadcastable to [B heads N M]; True where a query may look.
    Source: Vaswani et al. 2017, equation 1.
    """
    if mask is not None:
        return attention_plain.attend(q, k, v, mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    default, others = way("tpu", q, k), {name: way(name, q, k) for name in ("cpu", "cuda")}
    others = {name: other for name, other in others.items() if other is not default}
    return lax.platform_dependent(q, k, v, **others, default=default) if others else default(q, k, v)


def way(platform: str, q: Heads, k: Heads) -> Callable:
    """Returns the function that attends without a mask where it is lowered for "cpu", "cuda", "tpu" or another.

    q, k: arrays or their shapes, as `attend` takes them.  cuDNN is chosen only in a process that has a card for it,
    since even its tracing asks the card.
    """
    batch, length, heads, width = q.shape
    scores = length * k.shape[1]
    if platform == "cuda" and attention_cudnn.takes(q.dtype, width):
        return attention_cudnn.attend
    if 4 * batch * heads * scores > SCORES_AT_ONCE:
        return cached if platform == "cpu" else fitting
    return cached if platform == "cpu" and scores >= CACHED else attention_plain.attend
