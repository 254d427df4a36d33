"""Inpainting: repaints the masked part of a picture and keeps the rest bit for bit.

    images = inpaint(sd, ["a cat"], picture, mask)       # mask: 255 where to paint

Inpainting models read the mask and the masked picture; plain models get the known region with matching noise at every
step.  Source: the original inpainting checkpoints; Lugmayr et al. 2022 (RePaint) without resampling.

Shapes: B batch, H W pixels, h w latent pixels, c latent channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8
from PIL import Image, ImageFilter

from sdjax.diffusion.wrappers import KnownRegion
from sdjax.images.resize import fit, fitted, pad
from sdjax.sampling import control, seamless, settings
from sdjax.sampling.denoising import late, run
from sdjax.sampling.job import Job, Pictures, job
from sdjax.sampling.latents import decode, encode, latent_shape, size_of
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.inpainting import Inpainting


def inpaint(sd: StableDiffusion, prompts: str | Sequence[str], pictures: Any, masks: Any, **given: Any) -> Pictures:
    """Returns pictures uint8 [B H W 3], repainted where the mask is at least 128 and unchanged elsewhere.

    pictures: uint8 [H W 3], masks: uint8 [H W], 255 where to paint; one for all prompts or one per prompt.
    given: settings of settings.Inpaint, and arguments of job.job.
    strength: 1 starts from noise; less starts from the picture under the mask (see img2img).
    masked_content: another start than the picture under the mask; see `begun`.
    margin: for small regions of large pictures.  None computes the whole picture.  A number of pixels crops to the mask
    and that margin, computes the crop at `size`, by default the model's, in its aspect ratio, and pastes it back.
    size, resize: with a margin only the crop is resized, and the picture keeps its size; without one as in img2img.
    Raises ValueError for an empty mask, and for a model with another task.
    """
    return repainted(sd, job(settings.Inpaint, prompts, **given), pictures, masks)


def repainted(sd: StableDiffusion, job: Job, pictures: Any, masks: Any) -> Pictures:
    """Returns the pictures [B H W 3] of an inpainting job."""
    shared, count = job.settings, len(job.pictures)
    if not cropped(shared):
        pixels, holes = prepare(pictures, masks, count, *shared.target())
        return paste(painted(sd, job, pixels, holes), pixels, holes, shared.feather)
    pixels, holes = prepare(pictures, masks, count)
    size = size_of(sd, shared)
    boxes = [box(hole, shared.margin, size) for hole in holes]
    near, around = (
        [one[place] for one, place in zip(many, boxes, strict=True)] for many in (pixels, 255 * holes.astype(np.uint8))
    )
    shown, hidden = prepare(near, around, count, size, "fill")
    made = pixels.copy()
    around_boxes = [control.near(one, boxes, pixels.shape[1:3], size) for one in job.control]
    small = painted(sd, dataclasses.replace(job, control=around_boxes), shown, hidden)
    for whole, place, one in zip(made, boxes, small, strict=True):
        whole[place] = unfilled(one, whole[place].shape[:2])
    return paste(made, pixels, holes, shared.feather)


def cropped(made: settings.Task) -> bool:
    """Returns whether only a crop around the mask is computed: with a margin."""
    return getattr(made, "margin", None) is not None


def box(hole: Bool[np.ndarray, "H W"], margin: int, size: Sequence[int]) -> tuple[slice, slice]:
    """Returns the slices of rows and columns around a hole [H W] with `margin` pixels, in the aspect ratio of `size`.

    At an edge the box shifts inwards; if the picture is too small for the aspect ratio, the box is clipped.
    Source: A1111's masking.get_crop_region and expand_crop_region.
    """
    ends = []
    for axis in (0, 1):
        places = np.flatnonzero(hole.any(1 - axis))
        ends.append((max(0, places[0] - margin), min(hole.shape[axis], places[-1] + 1 + margin)))
    (top, bottom), (left, right) = ends
    height, width = bottom - top, right - left
    wanted = max(height, round(width * size[0] / size[1])), max(width, round(height * size[1] / size[0]))
    return _widened(top, bottom, wanted[0], hole.shape[0]), _widened(left, right, wanted[1], hole.shape[1])


def _widened(first: int, last: int, wanted: int, side: int) -> slice:
    """Returns the slice of `wanted` places around first ... last, shifted and, if necessary, cut to 0 ... side."""
    first -= (wanted - (last - first)) // 2
    first = max(0, min(first, side - wanted))
    return slice(first, min(first + wanted, side))


def unfilled(made: UInt8[np.ndarray, "h w 3"], size: Sequence[int]) -> UInt8[np.ndarray, "H W 3"]:
    """Inverts resize.fit(picture, made's size, "fill") for a picture of `size`: returns it at that size again."""
    ratio = min(has / given for has, given in zip(made.shape, size, strict=False))
    inner = [max(1, round(given * ratio)) for given in size]
    top, left = ((has - one) // 2 for has, one in zip(made.shape, inner, strict=False))
    return fit(np.ascontiguousarray(made[top : top + inner[0], left : left + inner[1]]), size, "stretch")


def prepare(
    pictures: Any, masks: Any, count: int, size: int | Sequence[int] | None = None, mode: str = "crop"
) -> tuple[UInt8[np.ndarray, "B H W 3"], Bool[np.ndarray, "B H W"]]:
    """Returns (pictures uint8 [B H W 3], masks bool [B H W], True where to paint) of one size.

    Raises ValueError for a mask of another size than its picture, or without a place to paint.
    """
    pixels = fitted(pictures, count, size, mode)
    holes = fitted(masks, count, None if size is None else pixels.shape[1:3], mode, channels=None)
    if holes.shape != pixels.shape[:3]:
        raise ValueError(f"a mask of {holes.shape[1:]} pixels for a picture of {pixels.shape[1:3]}: expected the same")
    holes = holes >= 128
    if not holes.any((1, 2)).all():
        raise ValueError("the mask is empty: expected white where to paint")
    return pixels, holes


def paste(
    made: UInt8[np.ndarray, "B H W 3"],
    given: UInt8[np.ndarray, "B H W 3"],
    holes: Bool[np.ndarray, "B H W"],
    feather: int = 0,
) -> UInt8[np.ndarray, "B H W 3"]:
    """Returns the painted pictures within the holes [B H W] and the given ones elsewhere, uint8 [B H W 3].

    feather: at d pixels from the kept region, the painted share is d / (feather + 1), at most 1.
    """
    share = np.stack([_depth(hole, feather + 1) for hole in holes])[..., None] / (feather + 1)
    mixed = np.round(share * made + (1 - share) * given).astype(np.uint8)
    return np.where(holes[..., None], mixed, given)


def _depth(hole: Bool[np.ndarray, "H W"], most: int) -> Float32[np.ndarray, "H W"]:
    """Returns the distance in pixels to the nearest place outside a hole [H W], at most `most`; 0 outside.

    The distance is max(|dx|, |dy|); the picture's edge does not count as outside.
    """
    from scipy import ndimage

    if hole.all():
        return np.full(hole.shape, most, np.float32)
    depth: Any = ndimage.distance_transform_cdt(hole, "chessboard")
    return np.minimum(depth, most).astype(np.float32)


def painted(
    sd: StableDiffusion, job: Job, pixels: UInt8[np.ndarray, "B H W 3"], holes: Bool[np.ndarray, "B H W"]
) -> UInt8[np.ndarray, "B H W 3"]:
    """Returns the model's pictures [B H W 3], before pasting."""
    sd, skipped = seamless.of(sd, job.settings), late(job)  # skipped: 0 if it starts from noise only
    whole, hidden = pad(pixels, sd.factor), pad(holes, sd.factor)
    latent_shape(sd, whole.shape[1:3])
    knows_masks = sd.networks["unet"].config.in_channels > sd.networks["vae"].config.latent_channels
    z, cond = None, None
    if skipped or not knows_masks:
        z = begun(sd, job, whole, hidden)
    if knows_masks:
        how = {"encode": lambda masked: encode(sd, masked, job.keys)}
        cond = Inpainting().given(sd, whole, hidden, how)
    shape = (whole.shape[1] // sd.factor, whole.shape[2] // sd.factor, sd.networks["vae"].config.latent_channels)
    noise = job.start_noise(shape)
    region = None if knows_masks else KnownRegion(_any(hidden, sd.factor), z, noise)
    z = z if skipped else None
    made = decode(sd, run(sd, job, noise, z=z, skipped=skipped, cond=cond, region=region))
    return made[:, : pixels.shape[1], : pixels.shape[2]]


def begun(
    sd: StableDiffusion, job: Job, pixels: UInt8[np.ndarray, "B H W 3"], holes: Bool[np.ndarray, "B H W"]
) -> Float[Array, "B h w c"]:
    """Returns the latents [B h w c] that the masked content begins from.

    original: those of the pictures.  fill: of the pictures with the holes `filled`.  noise: filled, and within the
    holes the seeds' noise.  nothing: filled, and within the holes 0.
    Source: A1111's inpainting_fill, modules/processing.py.
    """
    content = job.settings.masked_content
    if content == "original":
        return encode(sd, pixels, job.keys)
    z = encode(sd, np.stack([filled(*one) for one in zip(pixels, holes, strict=True)]), job.keys)
    mask = _any(holes, sd.factor)
    if content == "noise":
        return z * (1 - mask) + job.seeded_noise(z.shape[1:]) * mask
    return z * (1 - mask) if content == "nothing" else z


FILLS = (256, 64, 16, 16, 4, 4, 4, 4, 2, 2)  # radii of the blurs, in pixels; A1111's modules/masking.py, fill


def filled(picture: UInt8[np.ndarray, "H W 3"], hole: Bool[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a picture [H W 3] whose hole has the colours around it.

    Blurs of the known part lie on each other, each finer than the one below, and the picture itself lies on top.
    Source: A1111's masking.fill.
    """
    known = Image.fromarray(np.dstack([picture, np.where(hole, 0, 255).astype(np.uint8)]), "RGBA").convert("RGBa")
    made = Image.new("RGBA", known.size)
    blurs = {radius: known.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA") for radius in set(FILLS)}
    for layer in (*(blurs[radius] for radius in FILLS), known.convert("RGBA")):
        made.alpha_composite(layer)
    return np.asarray(made.convert("RGB"))


def _any(holes: Bool[np.ndarray, "B H W"], factor: int) -> Float32[Array, "B h w 1"]:
    """Returns the latent's mask [B h w 1], 1 where any pixel is masked."""
    count, height, width = holes.shape
    blocks = holes.reshape(count, height // factor, factor, width // factor, factor)
    return jnp.asarray(np.any(blocks, axis=(2, 4))[..., None], jnp.float32)
