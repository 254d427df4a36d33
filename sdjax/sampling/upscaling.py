"""Larger pictures: the x4 upscaler, LDM-SR, and the second pass at a larger size that is known as hires fix.

    large = upscale(upscaler, ["a white cat"], small)                # uint8 [B 4H 4W 3]
    large = super_resolve(ldm_sr, small)                             # likewise, without words
    large = hires(sd, ["a white cat"], scale=2, strength=0.7)

Shapes: B batch, H W pixels, h w latent pixels, c latent channels.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from sdjax.diffusion.model import Cond
from sdjax.images.resize import fitted
from sdjax.sampling import generate, tiles
from sdjax.stable_diffusion import StableDiffusion, to_pixels
from sdjax.tasks.upscaling import Upscaling

MAX_NOISE_LEVEL = 350  # of training: Stability-AI stablediffusion, configs/stable-diffusion/x4-upscaling.yaml
METHODS = ("latent", "lanczos")


def upscale(
    sd: StableDiffusion,
    prompts: list[str],
    pictures: Any,
    *,
    noise_level: int = 20,
    size: int | Sequence[int] | None = None,
    resize: str = "crop",
    tile: int | None = None,
    overlap: int = 16,
    **settings: Any,
) -> UInt8[np.ndarray, "B 4*H 4*W 3"]:
    """Returns pictures uint8 [B fH fW 3], f = 4 times larger than the given ones with Stable Diffusion's upscaler.

    prompts: what is seen; "" where nothing is to be said.  pictures: uint8 [H W 3], one, or one per prompt.
    noise_level: 0 to 350, noise put on the small picture: more invents more.
    size: pixels to which the small pictures are brought first, by resize.fit; 64 makes 256 of anything; None keeps
    theirs.  tile: None does the whole at once; a number of small pixels does squares of it, `overlap` of them shared.
    settings: see generate.Job; steps=75 and guidance=9 where not given, as the checkpoint's pipeline has them.
    Raises ValueError for a noise level out of range, and for a model with another task.
    """
    job = generate.Job(prompts, **{"steps": 75, "guidance": 9.0, **settings})
    if not 0 <= noise_level <= MAX_NOISE_LEVEL:
        raise ValueError(f"noise_level={noise_level}: expected 0 to {MAX_NOISE_LEVEL}")
    if sd.networks["unet"].config.num_class_embeds is None:
        raise ValueError("the UNet takes no noise level: expected an upscaler")
    small = to_pixels(fitted(pictures, len(job.prompts), size, resize))
    level = jnp.full(len(small), noise_level, jnp.int32)
    noise = generate.picture_noise(job.keys, small.shape[1:])
    cond = Upscaling().given(sd, small, None, {"noise": noise, "noise_level": level})
    return _enlarged(sd, job, cond.pop("extra"), cond, tile, overlap)


def super_resolve(
    sd: StableDiffusion,
    pictures: Any,
    *,
    size: int | Sequence[int] | None = None,
    resize: str = "crop",
    tile: int | None = None,
    overlap: int = 16,
    **settings: Any,
) -> UInt8[np.ndarray, "B 4*H 4*W 3"]:
    """Returns pictures uint8 [B fH fW 3], f = 4 times larger than the given ones with LDM-SR, which reads no words.

    pictures: uint8 [H W 3], one or several.  size, resize, tile, overlap: as for `upscale`.
    settings: see generate.Job; steps=75 where not given, as on the command line; eta=1 has the fresh noise of the
    original's notebook.
    Raises ValueError for guidance, and for a model with another task.
    Source: Rombach et al. 2022, section 4.4 and the model bsr_sr; the low-resolution picture is seen as it is.
    """
    if "text_encoder" in sd.parts:
        raise ValueError("the model reads words: expected LDM-SR; a Stable Diffusion upscaler is for `upscale`")
    pictures = [pictures] if isinstance(pictures, np.ndarray) and pictures.ndim == 3 else list(pictures)
    job = generate.Job([""] * len(pictures), **{"steps": 75, "guidance": 1.0, **settings})
    if job.guidance != 1:
        raise ValueError(f"guidance={job.guidance}: LDM-SR reads no words to be guided by; expected 1")
    return _enlarged(sd, job, to_pixels(fitted(pictures, len(pictures), size, resize)), {}, tile, overlap)


def _enlarged(
    sd: StableDiffusion,
    job: generate.Job,
    low: Float32[Array | np.ndarray, "B h w 3"],
    cond: Cond,
    tile: int | None,
    overlap: int,
) -> UInt8[np.ndarray, "B 4*h 4*w 3"]:
    """Returns the pictures that a network makes which sees `low` [B h w 3] behind its latent of the same size."""
    noise = job.start_noise((*low.shape[1:3], sd.networks["vae"].config.latent_channels))

    def part(both):
        start, seen = both[..., : noise.shape[-1]], both[..., noise.shape[-1] :]
        return generate.run(sd, job, start, cond=cond, extra=seen)

    whole = jnp.concatenate([noise, low], axis=-1)
    return generate.decode(sd, part(whole) if tile is None else jnp.asarray(tiles.over(part, whole, tile, overlap)))


def hires(
    sd: StableDiffusion,
    prompts: list[str],
    *,
    scale: float = 2.0,
    strength: float = 0.7,
    method: str = "latent",
    hires_steps: int | None = None,
    size: int | Sequence[int] | None = None,
    **settings: Any,
) -> UInt8[np.ndarray, "B H W 3"]:
    """Returns pictures uint8 [B H W 3] made at `size`, enlarged `scale` times and painted over with some strength.

    So that a model composes at the size that it knows.  method: latent, enlarges the latents, bilinear; lanczos, the
    pictures.  hires_steps: of the second pass; None as many as of the first.  settings: see generate.Job; in prompts
    [a:b:12] counts steps of both passes and [a:b:1.5] is half of the second's, as in A1111.
    Raises ValueError for an unknown method, a strength outside 0 to 1 or that leaves no step, and for settings and
    sizes that generate.Job or the model does not take.
    Source: A1111's hires fix.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    job = generate.Job(prompts, **settings)
    second = generate.Job(prompts, **{**settings, "steps": hires_steps or job.steps, "noise": None})
    skipped = generate.first_step(second.steps, strength)
    h, w, channels = generate.latent_shape(sd, size)
    large = round(h * scale), round(w * scale), channels
    z = generate.run(sd, job, job.start_noise((h, w, channels)))
    if method == "latent":
        z = jax.image.resize(z, (len(z), *large), "linear", antialias=False)
    else:
        pixels = tuple(side * sd.factor for side in large[:2])
        z = generate.encode(sd, fitted(list(generate.decode(sd, z)), len(z), pixels), job.keys)
    again: dict[str, Any] = dict(z=z, skipped=skipped, before=job.steps)
    return generate.decode(sd, generate.run(sd, second, second.start_noise(large), **again))
