"""Text to image: the UNet reads the noisy latent and the prompt only."""

from collections.abc import Mapping
from typing import Any

from jax import Array

from sdjax.models.cond import Cond
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task, channels


class TextToImage(Task):
    """Plain Stable Diffusion."""

    name = "text2img"

    def matches(self, sd: StableDiffusion) -> bool:
        """Returns whether the UNet reads only a latent's channels and a prompt."""
        taken, latent = channels(sd)
        return taken == latent and "text_encoder" in sd.parts

    def prepare(self, sd: StableDiffusion, key: Array) -> StableDiffusion:
        """Returns sd.  Raises SettingError for a model whose UNet reads more channels."""
        if not self.matches(sd):
            raise SettingError("task", self.name, "the task of the model, whose UNet reads more than a latent")
        return sd

    def inputs(self, sd: StableDiffusion, batch: Mapping[str, Array], key: Array) -> Cond:
        """Returns an empty Cond."""
        return Cond()

    def given(self, sd: StableDiffusion, pictures: Any, masks: Any, settings: Mapping[str, Any]) -> Cond:
        """Returns an empty Cond."""
        return Cond()
