"""Enlarges pictures: the x4 upscaler, LDM-SR, and a second, larger pass (hires fix).

    large = upscale(upscaler, ["a white cat"], small)                # uint8 [B 4H 4W 3]
    large = super_resolve(ldm_sr, small)                             # likewise, without words
    large = hires(sd, ["a white cat"], scale=2, strength=0.7)

Shapes: B batch, H W pixels, h w latent pixels, c latent channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.images.resize import fitted, nearest
from sdjax.models.cond import Cond
from sdjax.sampling import memory, seamless, settings, tiles
from sdjax.sampling.denoising import late, run
from sdjax.sampling.job import Job, Pictures, job, picture_noise
from sdjax.sampling.latents import decode, encode, wanted_shape
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion, to_pixels
from sdjax.tasks.upscaling import Upscaling


def upscale(sd: StableDiffusion, prompts: str | Sequence[str], pictures: Any, **given: Any) -> Pictures:
    """Returns pictures uint8 [B fH fW 3], f = 4 times larger than the given ones with Stable Diffusion's upscaler.

    prompts: what the picture shows; "" is allowed.  pictures: uint8 [H W 3], one, or one per prompt.
    given: settings of settings.Upscale, and arguments of job.job; the defaults steps=75 and guidance=9 come from the
    checkpoint's pipeline.
    size: size in pixels to resize the small pictures to first (resize.fit); None keeps their own.
    tile: None computes the whole picture; a number of small pixels computes square tiles that share `overlap` pixels,
    at most half a tile.
    Raises SettingError for a noise level out of range, and ValueError for a model with another task.
    """
    if "text_encoder" not in sd.parts:
        raise ValueError("the UNet takes no noise level: expected an upscaler; use `super_resolve` for LDM-SR")
    return enlarged(sd, job(settings.Upscale, prompts, **given), pictures)


def super_resolve(sd: StableDiffusion, pictures: Any, **given: Any) -> Pictures:
    """Returns pictures uint8 [B fH fW 3], f = 4 times larger than the given ones with LDM-SR, which reads no words.

    pictures: uint8 [H W 3], one or several.  given: as for `upscale`; eta=1 adds the fresh noise of the original
    notebook.
    Raises SettingError for guidance, and ValueError for a model with another task.
    Source: Rombach et al. 2022, section 4.4 and the model bsr_sr; the network reads the small picture unchanged.
    """
    if "text_encoder" in sd.parts:
        raise ValueError("the model reads words: expected LDM-SR; use `upscale` for a Stable Diffusion upscaler")
    pictures = [pictures] if isinstance(pictures, np.ndarray) and pictures.ndim == 3 else list(pictures)
    return enlarged(sd, job(settings.Upscale, [""] * len(pictures), **settings.Upscale.WORDLESS | given), pictures)


def enlarged(sd: StableDiffusion, job: Job, pictures: Any) -> Pictures:
    """Returns the pictures [B fH fW 3] of an upscaling job, for either kind of model."""
    sd, shared = seamless.of(sd, job.settings), job.settings
    small = to_pixels(fitted(pictures, len(job.pictures), *shared.target()))
    if "text_encoder" not in sd.parts:
        return _enlarged(sd, job, small, Cond())
    if sd.networks["unet"].config.num_class_embeds is None:
        raise ValueError("the UNet takes no noise level: expected an upscaler")
    level = jnp.full(len(small), shared.noise_level, jnp.int32)
    noise = picture_noise(job.keys, small.shape[1:])
    cond = Upscaling().given(sd, small, None, {"noise": noise, "noise_level": level})
    return _enlarged(sd, job, cond.unet.channels, cond)


def suited(sd: StableDiffusion, picture: settings.Upscale) -> settings.Upscale:
    """Returns a picture's settings for a model; LDM-SR reads no prompt and no noise level.

    Raises SettingError for a prompt with LDM-SR.
    """
    return picture if "text_encoder" in sd.parts else picture.wordless()


def _enlarged(sd, job, low, cond):
    """Returns the pictures of a network that sees `low` [B h w 3] after its latent of the same size."""
    noise = job.start_noise((*low.shape[1:3], sd.networks["vae"].config.latent_channels))

    def part(both):
        start, seen = both[..., : noise.shape[-1]], both[..., noise.shape[-1] :]
        return run(sd, job, start, cond=cond.with_unet(channels=seen))

    whole, tile = jnp.concatenate([noise, low], axis=-1), job.settings.tile
    if tile is None:
        return decode(sd, part(whole))
    return decode(sd, jnp.asarray(tiles.over(part, whole, tile, min(job.settings.overlap, tile // 2))))


def hires(sd: StableDiffusion, prompts: str | Sequence[str], *, scale: float = 2.0, **given: Any) -> Pictures:
    """Returns pictures uint8 [B H W 3]: sampled at `size`, enlarged `scale` times and repainted.

    So the model composes the picture at its training size.
    given: settings of settings.TextToImage, and arguments of job.job.  hires_method: latent (bilinear, on latents),
    lanczos or nearest (on pictures).  hires_strength, hires_steps: strength and steps of the second pass.
    In prompts [a:b:12] counts the steps of both passes and [a:b:1.5] means half of the second pass, as in A1111.
    Raises SettingError for a strength that leaves no step, and for settings and sizes that do not fit the model.
    Source: A1111's hires fix.
    """
    return redone(sd, job(settings.TextToImage, prompts, hires=scale, **given))


def redone(sd: StableDiffusion, job: Job) -> Pictures:
    """Returns the pictures [B H W 3] of a job in two passes."""
    sd, shared = seamless.of(sd, job.settings), job.settings
    second = dataclasses.replace(job, pictures=tuple(one.again() for one in job.pictures), noise=None)
    skipped = late(second, shared.hires_strength, "hires_strength")
    h, w, channels = wanted_shape(sd, shared)
    large = round(h * shared.hires), round(w * shared.hires), channels
    if min(large) < 1:
        raise SettingError("hires", shared.hires, "a scale that leaves a picture")
    memory.check(sd, large[:2], 1)
    z = run(sd, job, job.start_noise((h, w, channels)))
    if shared.hires_method == "latent":
        z = jax.image.resize(z, (len(z), *large), "linear", antialias=False)
    else:
        pixels = tuple(side * sd.factor for side in large[:2])
        small = decode(sd, z)
        exact = shared.hires_method == "nearest"
        z = encode(sd, nearest(small, pixels) if exact else fitted(list(small), len(z), pixels), job.keys)
    return decode(sd, run(sd, second, second.start_noise(large), z=z, skipped=skipped, before=job))


def passes(made: settings.Task) -> int:
    """Returns the number of passes over the steps: two with `hires`."""
    return 2 if getattr(made, "hires", None) is not None else 1
