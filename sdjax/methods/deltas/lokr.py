"""LoKr: D = a kron(W1, W2), where either factor may be a product of rank r.

a = alpha / r, or 1 if both factors are whole.
W1 "lokr_w1" [o1 i1] or "lokr_w1_a" [o1 r], "lokr_w1_b" [r i1]; W2 "lokr_w2" [o2 i2 ...] or "lokr_w2_a" [o2 r],
"lokr_w2_b" [r i2 ...]; out = o1 o2, in = i1 i2.  Files may have a middle "lokr_t2" [r r height width].
Source: Yeh et al. 2023 (arXiv 2309.14859), section 3; LyCORIS for the split of sizes and the initial values.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sdjax.methods.deltas.delta import Delta, Factors
from sdjax.methods.deltas.layer import Draw, Drop, Layer
from sdjax.methods.deltas.lora import joined


class Lokr(Delta):
    """A Kronecker product of a small matrix and a larger one."""

    name = "lokr"
    roles = tuple(
        frozenset({*one, *other})
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for other in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
    )
    ranked = ("lokr_w1_b", "lokr_w2_b")
    multiplied = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def start(self, weight: Float32[Array, "..."], rank: int, draw: Draw, settings: Any) -> dict[str, Array]:
        """Returns W1 uniform and W2 zero; W2 is whole if a product of rank r would not be smaller."""
        (o1, o2), (i1, i2) = (split(size, settings.factor) for size in weight.shape[:2])
        rest = weight.shape[2:]
        made = {"lokr_w1": draw.uniform(o1, i1)}
        if rank >= max(o2, i2) / 2:
            return {**made, "lokr_w2": draw.zeros(o2, i2, *rest)}
        return {**made, "lokr_w2_a": draw.uniform(o2, rank), "lokr_w2_b": draw.zeros(rank, i2 * math.prod(rest))}

    def change(self, f: Factors, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns a kron(W1, W2)."""
        one, other = _pair(f)
        other = other.reshape(len(other), weight.shape[1] // one.shape[1], -1)
        if len(one) * len(other) != len(weight):
            raise ValueError(f"{len(one) * len(other)} outputs where the weight has {len(weight)}")
        made = jnp.einsum("ab,cdn->acbdn", one, other)
        return f["scale"] * made.reshape(weight.shape)

    def run(
        self, f: Factors, x: Float[Array, "B *space in"], y: Float32[Array, "B *space out"], layer: Layer, drop: Drop
    ) -> Float32[Array, "B *space out"]:
        """Returns kron(W1, W2) x without the product: W2 on each of i1 channel groups, then W1 across the groups."""
        one, other = _pair(f)
        inner = x.shape[-1] // one.shape[1]
        groups = jnp.moveaxis(x.reshape(*x.shape[:-1], one.shape[1], inner), -2, 1)  # [B i1 ... i2]
        groups = groups.reshape(-1, *groups.shape[2:])
        kernel = layer.weight.shape[2:]
        made = layer.product(groups, other.reshape(len(other), inner, *kernel))  # [B*i1 ... o2]
        made = jnp.moveaxis(made.reshape(len(x), -1, *made.shape[1:]), 1, -1)  # [B ... o2 i1]
        made = jnp.swapaxes(layer.mix(made, one), -1, -2)  # [B ... o1 o2]
        return drop.channels(f["scale"] * made.reshape(*made.shape[:-2], -1))

    def size(self, f: Factors) -> Float32[Array, ""]:
        """Returns a |W1| |W2|."""
        one, other = _pair(f)
        return f["scale"] * jnp.sqrt(jnp.sum(jnp.square(one)) * jnp.sum(jnp.square(other)) + 1e-12)


def _pair(f):
    """Returns (W1, W2)."""
    one = f["lokr_w1"] if "lokr_w1" in f else joined(f["lokr_w1_a"], f["lokr_w1_b"], None)
    other = f["lokr_w2"] if "lokr_w2" in f else joined(f["lokr_w2_a"], f["lokr_w2_b"], f.get("lokr_t2"))
    return one, other


def split(size: int, most: int) -> tuple[int, int]:
    """Returns (m, n) with m n = size and m <= n, as close to each other as possible with m or n at most `most`.

    most < 0 sets no limit.  If `most` divides the size, it is one of the two.  LyCORIS splits sizes in this way, so its
    files have these shapes.
    """
    if most > 0 and size % most == 0:
        return min(most, size // most), max(most, size // most)
    limit = size if most < 0 else most
    m = max((m for m in range(1, math.isqrt(size) + 1) if size % m == 0 and m <= limit), default=1)
    return m, size // m
