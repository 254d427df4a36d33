"""Painting a part of a picture anew, and leaving the rest as it is, bit for bit.

    images = inpaint(sd, ["a cat"], picture, mask)       # mask: 255 where to paint

Models with channels for the mask see it and the picture around it; plain ones are shown the known region with noise at
every step.  Source: algorithms of the original inpainting checkpoints; Lugmayr et al. 2022 (RePaint) without its jumps.

Shapes: B batch, H W pixels, h w latent pixels, c latent channels.
"""

import jax.numpy as jnp
import numpy as np

from sdjax import generate
from sdjax.diffusion.wrappers import KnownRegion, mask_channels
from sdjax.resize import fitted, pad


def inpaint(
    sd, prompts, pictures, masks, *, strength=1.0, feather=4, size=None, resize="crop", margin=None, **settings
):  # fmt: skip
    """Returns pictures uint8 [B H W 3] that are painted where the mask is at least half white, and as given elsewhere.

    pictures: uint8 [H W 3], masks: uint8 [H W], 255 where to paint; one for all prompts or one per prompt.
    strength: 0 to 1; 1 begins with noise alone, less with the picture under the mask (see img2img).
    feather: pixels over which the painted region fades in, inside the mask.
    size, resize: as in img2img; with the picture's own size nothing is resized.
    margin: None paints within the whole picture; a number of pixels, within the mask's box and so much around it, at
    the model's size, and puts that back: for small regions of large pictures.  settings: see generate.Job.
    Raises ValueError for a mask without a white place, and for a model with another task.
    """
    count = len(generate.Job(prompts, **settings).prompts)
    pixels, holes = prepare(pictures, masks, count, size, resize)
    if margin is None:
        return paste(painted(sd, prompts, pixels, holes, strength, settings), pixels, holes, feather)
    box, inner = _box(holes, margin), np.array(generate.latent_shape(sd)[:2]) * sd.factor
    shown, hidden = prepare(list(pixels[box]), list(255 * np.uint8(holes[box])), count, tuple(inner), "stretch")
    made = pixels.copy()
    small = painted(sd, prompts, shown, hidden, strength, settings)
    made[box] = fitted(list(small), count, made[box].shape[1:3], "stretch")
    return paste(made, pixels, holes, feather)


def _box(holes, margin):
    """Returns the index of the rows and columns that hold all holes [B H W] and `margin` pixels around them."""
    ends = []
    for axis, side in ((1, holes.shape[1]), (2, holes.shape[2])):
        places = np.flatnonzero(holes.any((0, 3 - axis)))
        ends.append(slice(max(0, places[0] - margin), min(side, places[-1] + 1 + margin)))
    return (slice(None), *ends)


def prepare(pictures, masks, count, size=None, mode="crop"):
    """Returns (pictures uint8 [B H W 3], masks bool [B H W]) of one size, True where to paint.

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


def paste(made, given, holes, feather=0):
    """Returns the painted pictures within the holes [B H W] and the given ones elsewhere, uint8 [B H W 3].

    feather: the painted share is d / (feather + 1) at d pixels from what is kept, 1 from there on.
    """
    share = np.stack([_depth(hole, feather + 1) for hole in holes])[..., None] / (feather + 1)
    mixed = np.round(share * made + (1 - share) * given).astype(np.uint8)
    return np.where(holes[..., None], mixed, given)


def _depth(hole, most):
    """Returns the distance in pixels to the nearest place outside a hole [H W], at most `most`; 0 outside.

    Distances are those of a square, max(|dx|, |dy|); the picture's edge is no outside.
    """
    depth, inside = np.zeros(hole.shape, np.float32), hole
    for _ in range(int(most)):
        depth += inside
        framed = np.pad(inside, 1, "edge")
        height, width = hole.shape
        inside = np.logical_and.reduce([framed[i : i + height, j : j + width] for i in range(3) for j in range(3)])
    return depth


def painted(sd, prompts, pixels, holes, strength, settings):
    """Returns pictures [B H W 3] as the model makes them, painted or not."""
    job = generate.Job(prompts, **settings)
    skipped = generate.first_step(job.steps, strength)
    whole, hidden = pad(pixels, sd.factor), pad(holes, sd.factor)
    generate.latent_shape(sd, whole.shape[1:3])
    knows_masks = sd.networks.unet.config.in_channels > sd.networks.vae.config.latent_channels
    z, extra = None, None
    if strength < 1 or not knows_masks:
        z = generate.encode(sd, whole, job.keys)
    if knows_masks:
        # The hole is mid-grey, 0 of [-1, 1], and its mask the nearest pixel's: so the checkpoints were trained.
        masked = generate.encode(sd, np.where(hidden[..., None], 127.5, whole).astype(np.float32), job.keys)
        mask = jnp.asarray(hidden[:, :: sd.factor, :: sd.factor, None], jnp.float32)
        extra = mask_channels(mask, masked)
    shape = (whole.shape[1] // sd.factor, whole.shape[2] // sd.factor, sd.networks.vae.config.latent_channels)
    noise = job.start_noise(shape)
    if not knows_masks:
        sd = sd.add(wrappers=KnownRegion(_any(hidden, sd.factor), z, noise))
    z = z if strength < 1 else None
    made = generate.decode(sd, generate.run(sd, job, noise, z=z, skipped=skipped, extra=extra))
    return made[:, : pixels.shape[1], : pixels.shape[2]]


def _any(holes, factor):
    """Returns the latent's mask [B h w 1], 1 where any pixel is to be painted."""
    count, height, width = holes.shape
    blocks = holes.reshape(count, height // factor, factor, width // factor, factor)
    return jnp.asarray(blocks.any((2, 4))[..., None], jnp.float32)
