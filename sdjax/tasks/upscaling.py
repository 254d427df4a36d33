"""Upscaling: the UNet also reads the noisy small picture and its noise level.

The small picture has the latent's size.  Its noise follows sd.low_schedule at a level from 0 to 349, drawn per example
in training.  Source: Stability-AI stablediffusion, configs/stable-diffusion/x4-upscaling.yaml.  Our choice: the
small picture is the mean of tiles.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sdjax import trees
from sdjax.diffusion.noise_schedule import Schedule, add_noise
from sdjax.models.cond import Cond
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task, channels, tiles, widened

LEVELS = 350  # noise levels of the small picture in training; max_noise_level of the original's config
CLASSES = 1000  # rows of the embedding of levels; num_classes in that config
SMALL = 3  # channels of the small picture
BETAS: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 2e-2}  # of its noise, low_scale_config there, and the latent's


class Upscaling(Task):
    """Enlarges a picture by the autoencoder's factor."""

    name, pixels, words = "upscaling", True, False

    def matches(self, sd: StableDiffusion) -> bool:
        """Returns whether the UNet reads a latent, a small picture, a noise level and a prompt."""
        taken, latent = channels(sd)
        labels = sd.networks["unet"].config.num_class_embeds
        return taken == latent + SMALL and labels is not None and "text_encoder" in sd.parts

    def prepare(self, sd: StableDiffusion, key: Array) -> StableDiffusion:
        """Returns sd with a UNet that also reads three more channels and a noise level; the level's embedding is zero.

        The small picture's noise gets the original schedule.
        """
        taken, latent = channels(sd)
        if self.matches(sd):
            return sd
        if taken != latent or "text_encoder" not in sd.parts:
            raise SettingError("task", self.name, f"a task of the model, whose UNet reads {taken} channels")
        sd = widened(sd, latent + SMALL)
        width = trees.flatten(sd.parts["unet"])["time_embedding.linear_2.bias"].shape[0]
        network = sd.networks["unet"].clone(config=replace(sd.networks["unet"].config, num_class_embeds=CLASSES))
        levels = {"class_embedding": {"embedding": jnp.zeros((CLASSES, width))}}
        sd = sd.replace(low_schedule=Schedule(**BETAS))
        return sd.with_networks(unet=network).with_parts(unet={**sd.parts["unet"], **levels})

    def inputs(self, sd: StableDiffusion, batch: Mapping[str, Array], key: Array) -> Cond:
        """Returns a Cond of channels [B h w 3] and labels [B]."""
        k_level, k_noise = (trees.example_keys(k, batch["index"]) for k in jax.random.split(key))
        small = tiles(batch["pixels"], sd.factor)
        level = jax.vmap(lambda k: jax.random.randint(k, (), 0, LEVELS))(k_level)
        noise = jax.vmap(lambda k: jax.random.normal(k, small.shape[1:], jnp.float32))(k_noise)
        return self.given(sd, small, None, {"noise": noise, "noise_level": level})

    def given(self, sd: StableDiffusion, pictures: Any, masks: Any, settings: Mapping[str, Any]) -> Cond:
        """Returns a Cond of channels [B h w 3] and labels [B].

        pictures: float in [-1, 1] [B h w 3].  settings: {"noise": standard normal [B h w 3], "noise_level": int [B]}.
        """
        level = settings["noise_level"]
        low = add_noise(sd.low_schedule or sd.schedule, pictures, settings["noise"], level)
        return Cond().with_unet(channels=low, labels=level)
