"""The interface of a head of E4T's encoder.

It computes the offset E [B C] of a word's embedding from features of a picture and of the UNet.
Shapes: B batch, H W pixels, h w latent pixels, n features of a picture, D their width, C text width.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Float32, Num

from sdjax.stable_diffusion import StableDiffusion
from sdjax.trees import Tree


class Head(Protocol):
    """A frozen dataclass; this class is its base.

    features: which UNet maps to pool: "all", or the last one of each "level".
    still: whether the domain word's embedding gets no gradient.
    """

    features: Any = "all"
    still: Any = False

    @staticmethod
    def matches(names: Sequence[str]) -> bool:
        """Returns whether this head has weights of these dotted names."""
        ...

    def shapes(self, sd: StableDiffusion) -> Tree:
        """Returns the shapes of the weights for a model's vision tower, UNet and text width."""
        ...

    def prepared(self, sd: StableDiffusion) -> StableDiffusion:
        """Returns sd without the parts of its Seen that this head does not read."""
        return sd

    def see(self, network: Any, tower: Tree, pixels: Float[Array, "B H W 3"]) -> Float32[Array, "B n D"]:
        """Returns the head's features of pixels [B H W 3] in [-1, 1] from the vision tower, float32 [B n D]."""
        ...

    def maps(
        self, sd: StableDiffusion, z: Float[Array, "B h w c"], t: Num[Array, " B"]
    ) -> Sequence[Float[Array, "B h w D"]]:
        """Returns the UNet's feature maps of latents z [B h w c] at times t [B] with the empty prompt."""
        ...

    def move(
        self, weights: Tree, features: Float[Array, "#B n D"], maps: Sequence[Float[Array, "B h w D"]]
    ) -> Float[Array, "B C"]:
        """Returns E [B C] from features of the picture, [B n D] or [1 n D], and the UNet's maps."""
        ...

    def penalised(self, move: Float[Array, "B C"], vector: Float[Array, "B C"]) -> Float[Array, "B C"]:
        """Returns the vector that the penalty squares: E, or v*, the word's resulting embedding."""
        return move


def linear(layer: Tree, x: Float[Array, "... D"]) -> Float[Array, "... C"]:
    """Returns x W + b for a layer {"kernel" [D C], "bias" [C]}."""
    return x @ layer["kernel"] + layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def pooled(maps: Sequence[Float[Array, "B h w D"]]) -> list[Float32[Array, "B D"]]:
    """Returns the mean of each map over its positions, float32 [B D]."""
    return [m.astype("float32").mean((1, 2)) for m in maps]


def layer_shapes(inputs: int, outputs: int) -> Tree:
    """Returns the shapes of a linear layer's weights."""
    return {
        "kernel": jax.ShapeDtypeStruct((inputs, outputs), "float32"),
        "bias": jax.ShapeDtypeStruct((outputs,), "float32"),
    }
