"""Relative changes, such as E4T's offsets: D = W * R elementwise, "relative" R [out in ...]."""

from jaxtyping import Array, Float32

from sdjax.methods.deltas.delta import Delta, Factors


class Relative(Delta):
    """A factor per element of the weight."""

    roles = (frozenset({"relative"}),)

    def change(self, f: Factors, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns W * R."""
        return weight * f["relative"].reshape(weight.shape)
