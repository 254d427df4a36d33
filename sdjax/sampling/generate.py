"""Pictures from prompts and from other pictures.

    images = text2img(sd, ["a photo of a face"], seeds=[0], steps=20, guidance=7.5)     # uint8 [B H W 3]
    images = img2img(sd, ["a sketch of a face"], images, strength=0.6)

settings.py declares the settings.  Every task is a Job, a batch of pictures (job.py), and a call of `run`
(denoising.py), as in inpainting.py and upscaling.py.  Image i depends on its own prompt, picture and seed, not on its
batch.

Shapes: B batch, H W pixels, h w latent pixels, c latent channels.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sdjax.images.resize import fitted, pad
from sdjax.models.cond import Cond
from sdjax.sampling import seamless, settings, slerp, tiles
from sdjax.sampling.denoising import encoded, late, run
from sdjax.sampling.fields import make
from sdjax.sampling.job import Job, Pictures, job
from sdjax.sampling.latents import decode, encode, wanted_shape
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion


def text2img(sd: StableDiffusion, prompts: str | Sequence[str], **given: Any) -> Pictures:
    """Returns pictures uint8 [B H W 3], one per prompt.

    given: settings of settings.TextToImage, and arguments of `job` such as `seeds`; for `hires` use sdjax.hires.
    Raises SettingError for settings or sizes that do not fit each other or the model.
    """
    return drawn(sd, job(settings.TextToImage, prompts, **given))


def img2img(sd: StableDiffusion, prompts: str | Sequence[str], pictures: Any, **given: Any) -> Pictures:
    """Returns pictures uint8 [B H W 3] that start from the given ones.

    pictures: uint8 [H W 3], one for all prompts or one per prompt.
    given: settings of settings.ImageToImage, and arguments of `job`.
    strength: share of the steps to run, starting from the picture with matching noise: the amount to repaint.
    size: size to fit the pictures to (resize.fit); None takes the first picture's.  Sizes that are not multiples of the
    model's grid are padded and cropped again.
    Source: Meng et al. 2022 (SDEdit); steps are counted as in diffusers.
    """
    return redrawn(sd, job(settings.ImageToImage, prompts, **given), pictures)


def drawn(sd: StableDiffusion, job: Job) -> Pictures:
    """Returns the pictures [B H W 3] of a text-to-image job."""
    sd, shape = seamless.of(sd, job.settings), wanted_shape(sd, job.settings)
    with tiles.ahead(sd, len(job.pictures), shape):
        z = run(sd, job, job.start_noise(shape))
    return decode(sd, z)


def redrawn(sd: StableDiffusion, job: Job, pictures: Any) -> Pictures:
    """Returns the pictures [B H W 3] of an image-to-image job."""
    sd, skipped = seamless.of(sd, job.settings), late(job)
    pixels = fitted(pictures, len(job.pictures), *job.settings.target())
    z = encode(sd, pad(pixels, sd.factor), job.keys)
    _, h, w, c = z.shape
    made = decode(sd, run(sd, job, job.start_noise((h, w, c)), z=z, skipped=skipped))
    return made[:, : pixels.shape[1], : pixels.shape[2]]


def interpolate(
    sd: StableDiffusion,
    prompts: str | Sequence[str],
    frames: int = 16,
    *,
    seeds: Any = 0,
    batch: int | None = None,
    **given: Any,
) -> Pictures:
    """Returns `frames` pictures uint8 [frames H W 3] between two prompts or two seeds.

    prompts: one or two.  seeds: one or two.  The start noise moves on an arc (slerp.slerp), the text encodings on a
    line; fresh noise comes from the first seed.  batch: frames computed at once; None is all.
    given: settings of settings.Interpolate.
    Raises SettingError for fewer than 2 frames, and ValueError for two prompts if their encoding changes with the step:
    with an E4T encoder, or another grammar than "plain".
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ends = [seeds] if np.ndim(seeds) == 0 else list(seeds)
    for name, some in (("prompts", texts), ("seeds", ends)):
        if len(some) not in (1, 2):
            raise SettingError(name, some, "one, or two")
    more = {name: given.pop(name) for name in ("progress", "watch") if name in given}
    values = {"prompt": texts[0], "to_prompt": texts[-1], "seed": ends[0], "to_seed": ends[-1], "frames": frames}
    return between(sd, make(settings.Interpolate, values | given), batch, **more)


def between(
    sd: StableDiffusion, way: settings.Interpolate, batch: int | None = None, progress: bool = False, watch: Any = None
) -> Pictures:
    """Returns the frames [frames H W 3] of an interpolation, `batch` at once; None is all."""
    if batch is not None and batch < 1:
        raise SettingError("batch", batch, "a whole number, 1 or more")
    sd, ends = seamless.of(sd, way), way.ends()
    (first, _), (last, _) = (end.texts for end in ends)
    if first != last and (sd.conditioners or not way.plain):
        raise ValueError(
            "prompts: cannot interpolate between two prompts with an E4T encoder or a grammar; expected one"
        )
    frames, count = way.frames, min(batch or way.frames, way.frames)
    shape, share, made = wanted_shape(sd, way), np.linspace(0, 1, frames, dtype=np.float32), []
    low, high = (Job((end,)).start_noise(shape) for end in ends)
    texts = [] if first == last else [encoded(sd, [text], way).unet for text in (first, last)]
    for done in range(0, frames, count):
        places = np.minimum(np.arange(done, done + count), frames - 1)  # the last batch has the same shape
        part = share[places]
        cond = Cond(jax.tree.map(functools.partial(_mixed, part), *texts)) if texts else None
        some = Job((way,) * len(places), progress=progress, watch=watch)
        made.append(decode(sd, run(sd, some, slerp.slerp(low, high, part[:, None, None, None]), cond=cond)))
    return np.concatenate(made)[:frames]


def _mixed(part, one, other):
    """Returns (1 - part) one + part other, [B ...], for arrays [1 ...]."""
    part = part.reshape(-1, *(1,) * (one.ndim - 1))
    return (1 - part) * one + part * other
