"""The inputs of a network besides the latent and the time.

    cond = sd.condition(sd.tokenize(["a cat"]))
    cond = cond.with_unet(channels=small).with_own(concept=pixels)

The first axis of every leaf is the batch, since guidance concatenates conds.  Shapes: B batch, N tokens, C text width,
P pooled width, h w latent pixels, E extra channels.
"""

from typing import Any, Self

from flax import struct


class UNetInputs(struct.PyTreeNode):
    """The UNet's inputs; None: absent.

    context [B N C]: the text.  pooled [B P], size [B 6]: for SDXL's kind of UNet.  labels int [B]: for the class
    embedding, such as the upscaler's noise levels.  residuals: (maps, middle) from ControlNets.  channels [B h w E]:
    extra channels after the latent's, the same at every time.
    """

    context: Any = None
    pooled: Any = None
    size: Any = None
    labels: Any = None
    residuals: Any = None
    channels: Any = None


class Cond(struct.PyTreeNode):
    """The inputs of the UNet, and of conditioners, wrappers and hooks.

    words: {encoder: {"ids" int32 [B N]; for weighted prompts also "weights" [B n L], "empty" [B L C]}}.
    own: {name: arrays} for methods, such as "concept" [B H W 3] and "control.0".
    also: the Conds of further prompts (AND); share [B prompts]: the weights of all, including the first.
    negative: a conditioner's Cond of the negative prompt in this step; it replaces guidance's own.
    skip: the number of last text encoder layers to skip, clip_skip - 1.
    """

    unet: UNetInputs = struct.field(default_factory=UNetInputs)
    words: Any = struct.field(default_factory=dict)
    own: Any = struct.field(default_factory=dict)
    also: tuple = ()
    share: Any = None
    negative: Any = None
    skip: int = struct.field(pytree_node=False, default=0)

    def with_unet(self, **inputs: Any) -> Self:
        """Returns the cond with other inputs of the UNet."""
        return self.replace(unet=self.unet.replace(**inputs))

    def with_own(self, **own: Any) -> Self:
        """Returns the cond with more inputs for methods."""
        return self.replace(own={**self.own, **own})

    def over(self, base: "Cond") -> Self:
        """Returns this cond with missing inputs taken from `base`, without further prompts and negative."""
        said = {name: value for name, value in vars(self.unet).items() if value is not None}
        words, own = {**base.words, **self.words}, {**base.own, **self.own}
        skip = self.skip if self.words else base.skip
        return type(self)(unet=base.unet.replace(**said), words=words, own=own, skip=skip)
