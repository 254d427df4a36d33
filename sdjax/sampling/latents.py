"""Encodes pictures and decodes latents, in tiles if they are large.

Shapes: B batch, H W pixels, h w latent pixels, c latent channels.
"""

from typing import Any

import jax
from jaxtyping import Array, Float, Key

from sdjax.runtime import replicas
from sdjax.sampling import finite, memory, tiles
from sdjax.sampling.fields import Size
from sdjax.sampling.job import Pictures, split_keys
from sdjax.sampling.settings import Task
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion, to_pictures, to_pixels


def latent_shape(sd: StableDiffusion, size: Any = None) -> tuple[int, int, int]:
    """Returns (h, w, c) of the latents of pictures of `size` (height, width) pixels; None takes the model's size.

    Raises ValueError for a side that is not a positive multiple of sd.factor, and for a picture that does not fit
    into memory.
    """
    config = sd.networks["unet"].config
    if size is None:
        height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        return height, width, sd.networks["vae"].config.latent_channels
    height, width = size = Size.of(size)
    if min(height, width) < sd.factor or height % sd.factor or width % sd.factor:
        near = Size(*(max(sd.factor, round(side / sd.factor) * sd.factor) for side in size))
        raise SettingError("size", size, f"sides that are multiples of {sd.factor}, such as {near}")
    memory.check(sd, (height // sd.factor, width // sd.factor), 1)
    return height // sd.factor, width // sd.factor, sd.networks["vae"].config.latent_channels


def wanted_shape(sd: StableDiffusion, made: Task) -> tuple[int, int, int]:
    """Returns (h, w, c) of the latents for a picture's settings; raises the errors of `latent_shape`."""
    return latent_shape(sd, made.size)


def size_of(sd: StableDiffusion, made: Task) -> Size:
    """Returns the size (height, width) in pixels of the settings or, by default, of the model."""
    return made.size or Size(*(side * sd.factor for side in latent_shape(sd)[:2]))


def sized(made: Task) -> bool:
    """Returns whether the settings have a picture size."""
    return made.size is not None


def encode(sd: StableDiffusion, pictures: Any, keys: Key[Array, " B"]) -> Float[Array, "B h w c"]:
    """Returns scaled latents [B h w c], sampled once, of pictures uint8 [B H W 3]; encodes large ones in tiles.

    keys: one per picture [B]; the sample does not depend on the sampling noise of the same key.
    """
    sd, place = replicas.share(sd.bare, len(pictures))
    z = _draw_latents(sd, tiles.moments(sd, place(to_pixels(pictures))), place(keys))
    return finite.made("latents of the given pictures", z)


def decode(sd: StableDiffusion, z: Float[Array, "B h w c"]) -> Pictures:
    """Returns pictures uint8 [B H W 3] from scaled latents [B h w c]; decodes large ones in tiles, to save memory."""
    sd, place = replicas.share(sd.bare, len(z))
    with memory.told(tuple(side * sd.factor for side in z.shape[1:3]), len(z)):
        return to_pictures(finite.made("pixels", tiles.decode(sd, place(z))))


@jax.jit
def _draw_latents(sd, moments, keys):
    return sd.latents(moments, split_keys(keys)[2])
