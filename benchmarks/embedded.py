"""Draws Pocketland pictures in the embedded model's size.

pictures = [embedded.draw(who, place)]        # uint8 [SIDE SIDE 3]
"""

import functools

from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.formats.storage import files
from sdjax.stable_diffusion import StableDiffusion


def side(sd: StableDiffusion) -> int:
    """Returns the side of a model's pictures in pixels."""
    return sd.networks["unet"].config.sample_size * sd.factor


def _side():
    """Returns the side of the embedded model's pictures, from its configs."""
    unet, vae = (files.read_json(pipeline.POCKET / part / "config.json") for part in ("unet", "vae"))
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


SIDE = _side()
draw = functools.partial(pocketland.draw, size=SIDE)
