"""OFT: W' = R W with R orthogonal and block-diagonal on the outputs, R = (I + Q)(I - Q)^-1, Q = P - P^T.

P "oft_blocks" [blocks n n], out = blocks n.  "constraint": the limit of the norm of all Q together, if above 0.
"rescale" [out 1 ...]: a factor per output after R, in files.  A block computes W'_m = sum_n R_nm W_n.
Source: Qiu et al. 2023 (arXiv 2306.07280), section 4; axes and constraint: LyCORIS' diag-oft and sd-scripts.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sdjax.methods.deltas.delta import Delta, Factors
from sdjax.methods.deltas.layer import Draw, Drop, Layer
from sdjax.methods.deltas.lokr import split


class Oft(Delta):
    """A rotation of the outputs in blocks of at most `rank` outputs."""

    name = "oft"
    multiplied = ("oft_blocks",)

    def matches(self, names: frozenset[str]) -> bool:
        """Returns whether the factors have blocks."""
        return "oft_blocks" in names

    def start(self, weight: Float32[Array, "..."], rank: int, draw: Draw, settings: Any) -> dict[str, Array]:
        """Returns P = 0."""
        side, blocks = split(len(weight), rank)
        return {"oft_blocks": draw.zeros(blocks, side, side)}

    def change(self, f: Factors, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns (R - I) W."""
        blocks, side, _ = f["oft_blocks"].shape
        moved = jnp.einsum("knm,kni->kmi", _turn(f), weight.reshape(blocks, side, -1), precision="highest")
        moved = moved.reshape(weight.shape)
        if "rescale" in f:
            gain = f["rescale"].reshape(-1, *(1,) * (weight.ndim - 1))
            moved = gain * (weight + moved) - weight
        return moved

    def run(
        self, f: Factors, x: Float[Array, "B *space in"], y: Float32[Array, "B *space out"], layer: Layer, drop: Drop
    ) -> Float32[Array, "B *space out"]:
        """Returns (R - I) y."""
        if "rescale" in f:
            return super().run(f, x, y, layer, drop)
        blocks, side, _ = f["oft_blocks"].shape
        rows, turn = y.reshape(*y.shape[:-1], blocks, side), _turn(f)
        moved = jnp.einsum("knm,...kn->...km", turn, rows, precision="highest")
        moved = jnp.swapaxes(drop.channels(jnp.swapaxes(moved, -1, -2)), -1, -2)  # drops whole blocks
        return moved.reshape(y.shape)

    def size(self, f: Factors) -> Float32[Array, ""]:
        """Returns |P|; OFT bounds it instead of |D|."""
        return jnp.sqrt(jnp.sum(jnp.square(f["oft_blocks"])) + 1e-12)


def _turn(f):
    """Returns R - I [blocks n n]."""
    skew = f["oft_blocks"] - f["oft_blocks"].swapaxes(1, 2)
    if "constraint" in f:
        norm = jnp.sqrt(jnp.sum(jnp.square(skew)) + 1e-16)
        most = f["constraint"]
        skew = skew * jnp.where((most > 0) & (norm > most), most / norm, 1.0)
    one = jnp.eye(skew.shape[1], dtype=jnp.float32)[None]
    return 2 * jnp.linalg.solve(one - skew, skew)  # (I - Q)^-1 (I + Q) - I
