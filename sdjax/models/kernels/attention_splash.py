"""Attention by Pallas' splash kernel: on a TPU scores stay on the chip, forward and backward.

Block sizes and limits are the best by the compiler's estimates for v5e, v5p and v6e; they have not run on a TPU.  Heads
are not padded.
"""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.kernels import divided

LEAST = 1024  # least number of positions; with fewer, or a text's 77 tokens, XLA is as fast
QUERIES, KEYS, INNER = 1024, 2048, 1024  # sizes of blocks; the kernel's own default is 128
LANES, WIDEST = 128, 160  # lanes of a vector unit; widest head that was compiled
ROWS, HEADS = (*divided.ROWS, "pictures"), "tensor"  # mesh axes that divide rows and heads


def attend(
    q: Float[Array, "B N heads d"], k: Float[Array, "B M heads d"], v: Float[Array, "B M heads d"]
) -> Float[Array, "B N heads d"]:
    """Returns attention of q [B N heads d] to k, v [B M heads d]; tracing it imports Pallas.

    On a mesh (jax.set_mesh) each device computes its own rows, since XLA does not divide such kernels.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = divided.free(mesh)
    if all(size == 1 for size in axes.values()):
        return _kernel(q, k, v)
    rows = tuple(name for name in axes if name in ROWS)
    place = PartitionSpec(rows, None, HEADS if HEADS in axes else None)
    whole = jax.shard_map(_kernel, in_specs=place, out_specs=place, axis_names=set(axes), check_vma=False)
    return whole(q, k, v)


def takes(dtype: DTypeLike, rows: int, length: int, others: int, heads: int, width: int) -> bool:
    """Returns whether the kernel supports attention of `length` positions to `others`, and libtpu is installed.

    It does not support a mesh that cannot divide rows and heads evenly, or several TPUs without a mesh (sampling).
    """
    if not (min(length, others) >= LEAST and length % LANES == 0 == others % LANES and width <= WIDEST and _compiles()):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.default_backend() == "tpu" and jax.device_count() > 1:
        return False
    even = rows % divided.parts(ROWS) == 0 and heads % divided.parts((HEADS,)) == 0
    return jnp.dtype(dtype) == jnp.bfloat16 and even


@functools.cache
def _compiles() -> bool:
    """Returns whether this environment compiles for TPUs; otherwise importing Pallas would be useless."""
    return importlib.util.find_spec("libtpu") is not None


def _kernel(q, k, v):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, length, heads, width), others = q.shape, k.shape[1]
    q, k, v = (x.swapaxes(1, 2) for x in (q * width**-0.5, k, v))
    queries, keys = _block(length, QUERIES), _block(others, KEYS)
    inner = _block(keys, INNER)
    sizes = splash.BlockSizes(queries, keys, inner, queries, keys, inner, queries, keys)
    mask = masks.MultiHeadMask([masks.FullMask((length, others))] * heads)
    kernel: Any = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)


def _block(length, most):
    """Returns the largest multiple of LANES up to `most` that divides `length`, which is a multiple of LANES."""
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)
