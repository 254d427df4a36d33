"""LoRA: D = a B A, or a B M A with a middle M for convolutions; a = alpha / r.

A "down" [r in ...], B "up" [out r ...], M "mid" [r r height width].
Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; LyCORIS (LoCon) for convolutions, where A has the kernel's size
and B is 1x1.  PiSSA: Meng et al. 2024 (arXiv 2404.02948); OLoRA: Büyükakyüz 2024 (arXiv 2406.01775).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sdjax.methods.deltas.delta import Delta, Factors
from sdjax.methods.deltas.layer import Draw, Drop, Layer

BEGUN = ("pissa", "olora")  # marks in files: training subtracted a B0 A0 from the base


class Lora(Delta):
    """Two low-rank factors in parallel to the layer."""

    name = "lora"
    roles = (frozenset({"down", "up"}), frozenset({"down", "up", "mid"}))
    ranked = ("down",)
    multiplied = ("down", "up", "mid")

    def matches(self, names: frozenset[str]) -> bool:
        """Returns whether these are LoRA's factors without DoRA's magnitudes."""
        return super().matches(names) and not names & {"outputs", "inputs"}

    def start(self, weight: Float32[Array, "..."], rank: int, draw: Draw, settings: Any) -> dict[str, Array]:
        """Returns A uniform as in torch's layers and B zero.

        For PiSSA, A and B come from the r largest singular values of W / a.  Training with PiSSA subtracts the initial
        product from W: D = a (B A - B0 A0).
        """
        out, *rest = weight.shape
        ones = (1,) * (len(rest) - 1)
        if settings.init == "default":
            return {"down": draw.uniform(rank, *rest), "up": draw.zeros(out, rank, *ones)}
        left, values, right = jnp.linalg.svd(weight.reshape(out, -1), full_matrices=False)
        if rank > len(values):  # more than W has
            values, left = jnp.pad(values, (0, rank - len(values))), jnp.pad(left, ((0, 0), (0, rank - left.shape[1])))
            right = jnp.pad(right, ((0, rank - len(right)), (0, 0)))
        root = jnp.sqrt(values[:rank] / settings.scale(rank))
        down, up = root[:, None] * right[:rank], left[:, :rank] * root[None]
        return {"down": down.reshape(rank, *rest), "up": up.reshape(out, rank, *ones)}

    def product(self, f: Factors) -> Float32[Array, "..."]:
        """Returns a B A, or a B M A."""
        return f["scale"] * joined(f["up"].reshape(len(f["up"]), -1), f["down"], f.get("mid"), turned=True)

    def change(self, f: Factors, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns a B A minus the initial product that training subtracted from W."""
        return super().change(f, weight) - _begun(f, weight)

    def run(
        self, f: Factors, x: Float[Array, "B *space in"], y: Float32[Array, "B *space out"], layer: Layer, drop: Drop
    ) -> Float32[Array, "B *space out"]:
        """Returns a B (A x) with dropout between A and B; no array has the size of W."""
        if any(name in f for name in (*BEGUN, "mid")):
            return super().run(f, x, y, layer, drop)
        h = drop.inner(layer.product(x, f["down"]))
        return f["scale"] * layer.mix(h, f["up"].reshape(len(f["up"]), -1))


def _begun(f, weight):
    """Returns the part that a file's training subtracted from W: PiSSA's singular values, OLoRA's a Q_r R_r, else 0."""
    kind = next((kind for kind in BEGUN if kind in f), None)
    if kind is None:
        return 0
    if weight.ndim != 2:
        raise ValueError(f"{kind} on a convolution")
    rank = len(f["down"])
    if kind == "pissa":
        left, values, right = jnp.linalg.svd(weight, full_matrices=False)
        left = left[:, :rank] * values[None, :rank]
    else:
        left, right = jnp.linalg.qr(weight)
    return f[kind] * jnp.matmul(left[:, :rank], right[:rank], precision="highest")


def joined(
    a: Float32[Array, "..."], b: Float32[Array, "r ..."], middle: Float32[Array, "..."] | None, turned: bool = False
) -> Float32[Array, "..."]:
    """Returns A B [out n]; with a middle M [r s height width], the product over both of its ranks, [out in h w].

    b: [r in ...]; its axes after the first are flattened.  With a middle, A is [r out], or [out r] if `turned`.
    """
    b = b.reshape(len(b), -1)
    if middle is None:
        return jnp.matmul(a, b, precision="highest")
    return jnp.einsum("rshw,ro,si->oihw", middle, a.T if turned else a, b, precision="highest")
