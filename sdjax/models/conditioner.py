"""The interface of a conditioner, which changes the network's inputs at every denoising step.

class Mine(struct.PyTreeNode, Conditioner):
    def __call__(self, sd, z, t, i, cond):
        return cond.with_unet(context=...), {}
"""

from typing import Any, Protocol, Self

from jaxtyping import Array, Float, Int, Num

from sdjax.models.cond import Cond


class Conditioner(Protocol):
    """A pytree with this class as a base, which supplies the defaults.

    A conditioner that encodes the prompt again skips cond.skip layers, see text.conditioning.reread.
    """

    @property
    def remade(self) -> dict[str, Any]:
        """Returns {text encoder: ids [n]} of the tokens whose rows it computes at every step.

        A negative prompt with such a token is in cond.negative and is also encoded again.
        """
        return {}

    def bound(self, words: dict[str, dict[str, Any]]) -> Self:
        """Returns self for a model with these ids of its adapter's words, {word: {text encoder: int32 [n]}}."""
        return self

    def __call__(
        self,
        sd: Any,
        z: Float[Array, "B h w c"],
        t: Num[Array, " B"],
        i: Int[Array, ""] | int,
        cond: Cond,
    ) -> tuple[Cond, dict[str, Any]]:
        """Returns (cond, aux) for denoising step i, latents z and times t; aux: {"penalty" [B]}, for the loss."""
        ...
