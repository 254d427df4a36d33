"""Whole changes of weights and biases from files: D itself ("diff"), or W' ("whole", Custom Diffusion).

Source: LyCORIS' full; Kumari et al. 2023 (Custom Diffusion), in diffusers' files.
"""

from jaxtyping import Array, Float32

from sdjax.methods.deltas.delta import Delta, Factors


class Whole(Delta):
    """A change with the shape of the weight."""

    roles = (frozenset({"diff"}), frozenset({"whole"}))
    multiplied = ("diff",)

    def product(self, f: Factors) -> Float32[Array, "..."]:
        """Returns D, the factor "diff"."""
        return f["scale"] * f["diff"]

    def change(self, f: Factors, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns D, or W' - W."""
        if "diff" in f:
            return super().change(f, weight)
        if len(f["whole"]) != len(weight):
            raise ValueError(f"{len(f['whole'])} outputs where the weight has {len(weight)}")
        return f["scale"] * (f["whole"].reshape(weight.shape) - weight)
