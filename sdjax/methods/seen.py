"""The inputs of E4T's encoder besides latents and times, in a model's reference under the method's name.

    sd = sd.with_own(e4t=Seen(half(sd), empty(sd), domain, nothing))
    sd = with_seen(sd, concept=pixels)                 # seen_by(sd).concept

Shapes: B batch, h w latent pixels, L tokens, C text width, D channels.
"""

import itertools
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Float

from sdjax import trees
from sdjax.models.unet import UNetConfig
from sdjax.stable_diffusion import StableDiffusion
from sdjax.trees import Tree

ENCODER = "text_encoder"  # the text encoder of the word
E4T_OWN = "e4t"  # key of the Seen in reference.own
HALF = r"^(conv_in|time_embedding|class_embedding|down_blocks|mid_block)\b"  # the weights that `features_only` uses


class Seen(struct.PyTreeNode):
    """The encoder's inputs; a head lists the fields it needs.

    unet: the pretrained UNet's down half.  empty [1 L C]: the encoded empty prompt.
    domain int32 [1]: the domain's token.  nothing int32 [1 L]: the empty prompt's tokens.
    concept [H W 3]: the picture, None if batches have their own.  features [1 n D]: the vision tower's features of it,
    None to compute them.
    """

    unet: Any
    empty: Any
    domain: Any
    nothing: Any
    concept: Any = None
    features: Any = None


def seen_by(sd: StableDiffusion) -> Seen:
    """Returns the inputs of sd's encoder."""
    return sd.reference.own[E4T_OWN]


def with_seen(sd: StableDiffusion, **fields: Any) -> StableDiffusion:
    """Returns sd with other inputs for its encoder, such as concept=pixels."""
    return sd.with_own(**{E4T_OWN: seen_by(sd).replace(**fields)})


def half(sd: StableDiffusion) -> Tree:
    """Returns the weights of sd's UNet that its features depend on."""
    return trees.partition(sd.parts["unet"], HALF)[0]


def empty(sd: StableDiffusion) -> Float[Array, "1 L C"]:
    """Returns the UNet's context for the empty prompt, [1 L C]."""
    return jax.jit(lambda sd, ids: sd.condition(ids).unet.context)(sd, sd.tokenize([""]))


def map_widths(config: UNetConfig) -> tuple[int, ...]:
    """Returns the channels of the UNet's feature maps: conv_in, every block and downsampler, the middle.

    SD 1.5: 13 maps, 10880 channels together.
    """
    channels, last = config.block_out_channels, len(config.block_out_channels) - 1
    widths = [channels[0]]
    for level, (width, count) in enumerate(zip(channels, config.levels("layers_per_block"), strict=True)):
        widths += [width] * (count + (level < last))
    return (*widths, channels[-1])


def level_maps(config: UNetConfig) -> tuple[int, ...]:
    """Returns the numbers of the last map before each downsampler, and of the middle: (2, 5, 8, 12) for SD 1.5."""
    ends = itertools.accumulate(count + 1 for count in config.levels("layers_per_block")[:-1])
    return (*(end - 1 for end in ends), len(map_widths(config)) - 1)
