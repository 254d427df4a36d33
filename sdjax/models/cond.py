"""What a network is told beside the latent and the time.

    cond = sd.condition(sd.tokenize(["a cat"]))
    cond = cond.with_unet(channels=small).with_own(concept=pixels)

Every leaf has the batch first, since guidance concatenates conds.  Shapes: B batch, N tokens, C text width, P pooled
width, h w latent pixels, E extra channels.
"""

from typing import Any, Self

from flax import struct


class UNetInputs(struct.PyTreeNode):
    """What reaches the UNet; None: what it is not told.

    context [B N C]: the text.  pooled [B P], size [B 6]: of SDXL's kind.  labels int [B]: of the class embedding, such
    as the upscaler's noise levels.  residuals: (maps, middle), as ControlNets make them.  channels [B h w E]: read
    behind the latent, as they are at every time.
    """

    context: Any = None
    pooled: Any = None
    size: Any = None
    labels: Any = None
    residuals: Any = None
    channels: Any = None


class Cond(struct.PyTreeNode):
    """The UNet's inputs, and what conditioners, wrappers and hooks read.

    words: {encoder: {"ids" int32 [B N], and where words are weighed "weights" [B n L], "empty" [B L C]}}.
    own: {name: arrays} of methods, such as "concept" [B H W 3] and "control.0".
    also: further prompts of AND, Conds; share [B prompts]: the weights of all, the first one's included.
    negative: what a conditioner made of the negative prompt in this step, a Cond; it goes before guidance's own.
    skip: how many of the text encoders' last layers the words leave out, clip skip - 1.
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
        """Returns the cond with more of what methods read."""
        return self.replace(own={**self.own, **own})

    def over(self, base: "Cond") -> Self:
        """Returns what this cond says, and what `base` says where this one is silent; of one prompt, without others."""
        said = {name: value for name, value in vars(self.unet).items() if value is not None}
        words, own = {**base.words, **self.words}, {**base.own, **self.own}
        skip = self.skip if self.words else base.skip
        return type(self)(unet=base.unet.replace(**said), words=words, own=own, skip=skip)
