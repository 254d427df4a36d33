"""The contract of a conditioner, which changes the network's inputs at every denoising step.

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
        """{text encoder: token ids [n]} whose rows it computes at every step.

        A negative prompt with one of them comes in cond.negative and is encoded again too.
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
        """Returns (cond, aux) of denoising step i, latents z and times t; aux: what the loss sees, {"penalty" [B]}."""
        ...
