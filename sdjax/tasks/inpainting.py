"""Inpainting: the UNet also reads the mask and the latent of the masked picture.

Channels: [z_t | mask | masked latent], as in the original checkpoints (LatentInpaintDiffusion, concat_keys).
A hole is mid-grey, 0 of [-1, 1]; the latent's mask takes the nearest pixel's value.
Source: the card of runwayml/stable-diffusion-inpainting for training: holes of synthetic shapes, a quarter of all
pictures wholly a hole, new channels with zero weights.  Rectangles and ellipses are from diffusers' inpainting example.
Boxes, wide strokes, and everything except a part (outpainting) are from LaMa, Suvorov et al. 2022, section 3.3.  The
numbers are our choice.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool

from sdjax import trees
from sdjax.diffusion.wrappers import mask_channels
from sdjax.models.cond import Cond
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task, channels, widened

WHOLE = 0.25  # share of pictures that are wholly a hole
KEPT = 0.4  # least share of a picture's side that outpainting starts from
LINES, BENDS, REACH, BRUSH = 3, 5, 0.25, (0.05, 0.2)  # of strokes; lengths and widths in units of the shorter side


class Inpainting(Task):
    """Repaints a part of a picture."""

    name, pixels = "inpainting", True

    def matches(self, sd: StableDiffusion) -> bool:
        """Returns whether the UNet reads a mask and a second latent."""
        taken, latent = channels(sd)
        return taken == 2 * latent + 1 and "text_encoder" in sd.parts

    def prepare(self, sd: StableDiffusion, key: Array) -> StableDiffusion:
        """Returns sd with a UNet that reads 2c + 1 channels; sd is a plain or an inpainting model."""
        taken, latent = channels(sd)
        if taken not in (latent, 2 * latent + 1) or "text_encoder" not in sd.parts:
            raise SettingError("task", self.name, f"a task of the model, whose UNet reads {taken} channels")
        return widened(sd, 2 * latent + 1)

    def inputs(self, sd: StableDiffusion, batch: Mapping[str, Array], key: Array) -> Cond:
        """Returns a Cond with channels [B h w c+1]; every example gets a new hole at every step."""
        k_hole, k_latent = (trees.example_keys(k, batch["index"]) for k in jax.random.split(key))
        pixels = batch["pixels"]
        _, height, width, _ = pixels.shape
        holes = jax.vmap(functools.partial(hole, size=(height, width)))(k_hole)
        return self.given(sd, pixels, holes, {"encode": lambda masked: sd.encode(masked, k_latent)})

    def given(self, sd: StableDiffusion, pictures: Any, masks: Any, settings: Mapping[str, Any]) -> Cond:
        """Returns a Cond with channels [B h w c+1].

        pictures: uint8 or float in [-1, 1] [B H W 3].  masks: bool [B H W], True where to paint.
        settings: {"encode": function from such pictures to scaled latents}.
        """
        grey, where = (0.0, jnp.where) if jnp.issubdtype(pictures.dtype, jnp.floating) else (127.5, np.where)
        masked = settings["encode"](where(masks[..., None], grey, pictures).astype(np.float32))
        mask = jnp.asarray(masks[:, :: sd.factor, :: sd.factor, None], jnp.float32)
        return Cond().with_unet(channels=mask_channels(mask, masked))


def hole(key: Array, size: tuple[int, int]) -> Bool[Array, "H W"]:
    """Returns a random hole in a picture of `size` (H, W), bool [H W].

    A fraction WHOLE of the keys gives the whole picture.  The others give a rectangle, an ellipse, brush strokes or the
    outside of a rectangle, each equally often.
    """
    *keys, k_kind, k_whole = jax.random.split(key, 6)
    kinds = jnp.stack([make(k, size) for make, k in zip((_box, _oval, _strokes, _outside), keys, strict=True)])
    return kinds[jax.random.randint(k_kind, (), 0, len(kinds))] | jax.random.bernoulli(k_whole, WHOLE)


def _box(key, size):
    """Returns a rectangle of any size."""
    return jnp.maximum(*_away(key, size, 0.0)) <= 1


def _oval(key, size):
    """Returns an ellipse of any size."""
    y, x = _away(key, size, 0.0)
    return y**2 + x**2 <= 1


def _outside(key, size):
    """Returns the outside of a rectangle, for outpainting; its sides are at least KEPT of the picture's."""
    return jnp.maximum(*_away(key, size, KEPT)) > 1


def _away(key, size, least):
    """Returns distances (y [H 1], x [1 W]) to the middle of a box in the picture, 1 at its border.

    Its sides are `least` to 1 of the picture's.
    """
    k_size, k_place = jax.random.split(key)
    sides = jnp.asarray(size, jnp.float32)
    half = jax.random.uniform(k_size, (2,), minval=least) * sides / 2
    middle = half + jax.random.uniform(k_place, (2,)) * (sides - 2 * half)
    rows, columns = (jnp.arange(side) + 0.5 for side in size)
    y, x = jnp.abs(rows - middle[0]) / half[0], jnp.abs(columns - middle[1]) / half[1]
    return jnp.broadcast_arrays(y[:, None], x[None])


def _strokes(key, size):
    """Returns LINES strokes of a brush, each with BENDS straight pieces with round ends."""
    k_start, k_way, k_wide = jax.random.split(key, 3)
    short = float(min(size))
    start = jax.random.uniform(k_start, (LINES, 1, 2)) * jnp.asarray(size, jnp.float32)[None, None]
    ways = short * REACH * jax.random.normal(k_way, (LINES, BENDS, 2))
    points = jnp.concatenate([start, start + jnp.cumsum(ways, 1)], 1)
    half = short / 2 * jax.random.uniform(k_wide, (LINES, 1), minval=BRUSH[0], maxval=BRUSH[1])
    y, x = (jnp.arange(side) + 0.5 for side in size)
    pieces = points[:, :-1].reshape(-1, 2), points[:, 1:].reshape(-1, 2), jnp.repeat(half, BENDS, 1).ravel()

    def draw(page, piece):
        one, other, half = piece
        way = other - one
        dy, dx = jnp.broadcast_arrays(y[:, None] - one[0], x[None] - one[1])
        share = jnp.clip((dy * way[0] + dx * way[1]) / jnp.maximum(jnp.sum(way**2), 1e-6), 0, 1)
        return page | ((dy - share * way[0]) ** 2 + (dx - share * way[1]) ** 2 <= half**2), None

    return jax.lax.scan(draw, jnp.zeros(size, bool), pieces)[0]
