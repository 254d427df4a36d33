"""The interface of a kind of weight change."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sdjax.methods.deltas.layer import Draw, Drop, Layer

Factors = Mapping[str, Any]  # {name: array} in a file's axes
# Factors that any kind may have besides its own: the scale, the file's alpha (kept only for writing), DoRA's
# magnitudes, and the marks that training started with a part of the base.
BESIDE = frozenset({"scale", "alpha", "outputs", "inputs", "pissa", "olora"})


class Delta(Protocol):
    """A class without settings; this class is its base.

    name: its value of the setting `algo`; "" if it occurs in files only.
    roles: the sets of names that its factors may have, without BESIDE.
    ranked: factors whose first axis is the rank.
    multiplied: factors to scale when the change shrinks; each gets a root of the scale.
    """

    name: str = ""
    roles: tuple[frozenset[str], ...] = ()
    ranked: tuple[str, ...] = ()
    multiplied: tuple[str, ...] = ()

    def matches(self, names: frozenset[str]) -> bool:
        """Returns whether factors of these names belong to this kind."""
        return names - BESIDE in self.roles

    def start(self, weight: Float32[Array, "..."], rank: int, draw: Draw, settings: Any) -> dict[str, Array]:
        """Returns the initial factors for training a weight [out in ...], without the scale.

        settings: methods.lora.Lora.  Raises SettingError for a setting that does not fit the weight.
        """
        ...

    def product(self, f: Factors) -> Float32[Array, "..."]:
        """Returns D, float32, with the scale, in any shape whose elements are in W's order."""
        ...

    def change(self, f: Factors, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns D(W), float32.  Raises ValueError or TypeError if shapes do not fit W."""
        made = self.product(f)
        if len(made) != len(weight):
            raise ValueError(f"{len(made)} outputs where the weight has {len(weight)}")
        return made.reshape(weight.shape)

    def run(
        self, f: Factors, x: Float[Array, "B *space in"], y: Float32[Array, "B *space out"], layer: Layer, drop: Drop
    ) -> Float32[Array, "B *space out"]:
        """Returns op(x, D), the change of the layer's output at input x; y is the output without its bias."""
        return drop.channels(layer.product(x, self.change(f, layer.weight)))

    def size(self, f: Factors) -> Float32[Array, ""]:
        """Returns the Frobenius norm |D|."""
        return jnp.sqrt(jnp.sum(jnp.square(self.product(f))) + 1e-12)
