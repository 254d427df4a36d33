"""What a conditioner is: it changes what the network is told, once in every denoising step.

class Mine(struct.PyTreeNode, Conditioner):
    def __call__(self, sd, z, t, i, cond):
        return cond.with_unet(context=...), {}
"""

from typing import Any, Protocol, Self

from jaxtyping import Array, Float, Int, Num

from sdjax.models.cond import Cond


class Conditioner(Protocol):
    """A pytree that names this class as a base, which gives what it does not define itself.

    Clip skip is cond.skip: who encodes words anew leaves out as many layers (text.conditioning.reread).
    """

    @property
    def remade(self) -> dict[str, Any]:
        """{text encoder: token ids [n]} whose rows are made anew in every step.

        A negative prompt that holds one of them is given in cond.negative and read anew too.
        """
        return {}

    def bound(self, words: dict[str, dict[str, Any]]) -> Self:
        """Returns it for a model in which its adapter's words have these ids, {word: {text encoder: int32 [n]}}."""
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
