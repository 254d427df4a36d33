"""The interface of a task: the UNet's inputs besides prompt and noisy latent, in training and sampling.

task = tasks.of(sd)                                     # the model's own task, or tasks.of(sd, "inpainting")
sd = task.prepare(sd, key)
cond = task.inputs(sd, batch, key)                      # in addition to the prompt's inputs
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
    """A class without settings; this class is its base.

    name: its name in the setting `task`.  pixels: whether batches hold pixels instead of moments.
    words: whether a prompt alone gives a picture, for previews.
    """

    name: str = ""
    pixels: bool = False
    words: bool = True

    def matches(self, sd: StableDiffusion) -> bool:
        """Returns whether a model already does this task."""
        ...

    def prepare(self, sd: StableDiffusion, key: Array) -> StableDiffusion:
        """Returns a model that can learn the task, with unchanged output.  A model of the task stays unchanged.

        Raises SettingError for a model that cannot learn it.
        """
        ...

    def inputs(self, sd: StableDiffusion, batch: Mapping[str, Array], key: Array) -> Cond:
        """Returns the UNet's additional inputs in training: channels [B h w E], labels [B].

        Randomness belongs to the example: fold_in(key, batch["index"]).
        """
        ...

    def given(self, sd: StableDiffusion, pictures: Any, masks: Any, settings: Mapping[str, Any]) -> Cond:
        """Returns the same inputs for sampling, from given pictures and masks; settings: depend on the task."""
        ...


def widened(sd: StableDiffusion, channels: int) -> StableDiffusion:
    """Returns sd with a UNet that reads `channels` channels; the weights of new channels are zero."""
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
