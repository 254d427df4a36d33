"""Attention, with the implementation that suits its shape and platform.

    y = attend(q, k, v)        # [B N heads d], [B M heads d], [B M heads d] -> [B N heads d]

Each implementation has its own file: attention_plain (all scores at once), attention_parts (some scores at a time),
attention_cudnn (NVIDIA's fused kernel) and attention_splash (for TPUs).  docs/devices.md lists when each is used.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Bool, Float

from sdjax.models.kernels import attention_cudnn, attention_parts, attention_plain, attention_splash, divided

SCORES_AT_ONCE = 1 << 31  # above this many bytes on a device, scores are computed in parts on every platform
CACHED = 512 * 512  # least number of scores per head for parts on a CPU, which are faster then

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
        return _by_platform(attention_plain.attend, (), q, k, v, mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    default, others = way("", q, k), {name: way(name, q, k) for name in ("cpu", "cuda", "tpu")}
    return _by_platform(default, tuple(one for one in others.items() if one[1] is not default), q, k, v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_platform(default, others, *args):
    """Returns the attention, lowered for each platform; layers of one shape share this function."""
    return lax.platform_dependent(*args, **dict(others), default=default) if others else default(*args)


def way(platform: str, q: Heads, k: Heads) -> Callable:
    """Returns the function for attention without a mask on a platform: "cpu", "cuda", "tpu" or another.

    q, k: arguments of `attend`, or their shapes.  cuDNN is chosen only if this process has a suitable GPU, since its
    tracing needs one; the TPU's kernel only if libtpu is installed.
    """
    batch, length, heads, width = q.shape
    scores = length * k.shape[1]
    if platform == "cuda" and attention_cudnn.takes(q.dtype, width):
        return attention_cudnn.attend
    if platform == "tpu" and attention_splash.takes(q.dtype, batch, length, k.shape[1], heads, width):
        return attention_splash.attend
    if 4 * divided.rows(batch) * heads * scores > SCORES_AT_ONCE:
        return cached if platform == "cpu" else fitting
    return cached if platform == "cpu" and scores >= CACHED else attention_plain.attend
