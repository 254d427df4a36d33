"""What a task is: what the UNet reads beside words and noisy latent, while it trains and while it samples.

task = tasks.of(sd)                                     # what the model is for, or tasks.of(sd, "inpainting")
sd = task.prepare(sd, key)
cond = task.inputs(sd, batch, key)                      # beside the prompt's own
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax import trees
from sdjax.models.cond import Cond
from sdjax.stable_diffusion import StableDiffusion


class Task(Protocol):
    """A class without settings that names this one as its base.

    name: in the setting `task`.  pixels: whether a batch must hold pixels and not moments.
    words: whether words alone make a picture, which previews show.
    """

    name: str = ""
    pixels: bool = False
    words: bool = True

    def matches(self, sd: StableDiffusion) -> bool:
        """Returns whether a model is for this task as it is."""
        ...

    def prepare(self, sd: StableDiffusion, key: Array) -> StableDiffusion:
        """Returns a model that can learn the task and computes as before; one that is for it stays as it is.

        Raises SettingError for a model that cannot.
        """
        ...

    def inputs(self, sd: StableDiffusion, batch: Mapping[str, Array], key: Array) -> Cond:
        """Returns what training tells the UNet beside the words: channels [B h w E], labels [B].

        Draws belong to the example: fold_in(key, batch["index"]).
        """
        ...

    def given(self, sd: StableDiffusion, pictures: Any, masks: Any, settings: Mapping[str, Any]) -> Cond:
        """Returns the same for pictures and masks that are given to sample with; settings: each task says which."""
        ...


def widened(sd: StableDiffusion, channels: int) -> StableDiffusion:
    """Returns sd whose UNet reads `channels` in place of its latent's own, the new ones with weights of zero."""
    network = sd.networks["unet"]

    def change(name, kernel):  # [3 3 in out]
        return jnp.pad(kernel, ((0, 0), (0, 0), (0, channels - kernel.shape[2]), (0, 0)))

    network = network.clone(config=replace(network.config, in_channels=channels))
    return sd.with_networks(unet=network).with_parts(unet=trees.edit(sd.parts["unet"], r"^conv_in\.kernel$", change))


def channels(sd: StableDiffusion) -> tuple[int, int]:
    """Returns (channels that the UNet reads, channels of a latent)."""
    return sd.networks["unet"].config.in_channels, sd.networks["vae"].config.latent_channels


def tiles(x: Array | np.ndarray, factor: int) -> Array:
    """Returns the means of all factor x factor tiles of [B H W C]: [B H/factor W/factor C]."""
    count, height, width, depth = x.shape
    return x.reshape(count, height // factor, factor, width // factor, factor, depth).mean((2, 4))
