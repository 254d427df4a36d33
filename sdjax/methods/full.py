"""Full fine-tuning of any weights, chosen by part and by regular expression: fine-tuning, DreamBooth, Custom Diffusion.

Full(("unet", "text_encoder"))
Full(("unet",), r"attn2\\.to_(k|v)\\.kernel$")        # the weights of Custom Diffusion
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from sdjax import settings, trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Full(Method):
    """Trains the weights of `parts` whose dotted name matches `pattern`; the others stay frozen.

    keep: keep a copy of the untrained weights in `reference`, for a loss that preserves the model's earlier predictions
    (loss.preservation).
    """

    parts: tuple[str, ...] = ("unet",)
    pattern: str = ""
    keep: bool = False
    formats = ()

    def __post_init__(self):
        settings.check_pattern("pattern", self.pattern)

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns None: a whole model."""
        return None

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({part: chosen weights, float32 copies}, sd without them).

        Raises ValueError if the model lacks a part or no weight matches.
        """
        trained, rest = {}, {}
        for part in self.parts:
            tree = sd.parts.get(part)
            if not isinstance(tree, dict):
                raise SettingError("parts", part, "parts of this model, of unet, vae, text_encoder, image_encoder")
            chosen, rest[part] = trees.partition(tree, self.pattern)
            if not chosen:
                raise SettingError("pattern", self.pattern, f"a match among the names of {part}'s weights")
            trained[part] = trees.copy(chosen, jnp.float32)
        sd = sd.with_parts(**rest)
        return trained, sd.with_reference(base=trees.copy(trained)) if self.keep else sd

    def before(self, frozen: StableDiffusion) -> StableDiffusion:
        """Returns sd with the untrained weights.  Raises SettingError without `keep`."""
        if not self.keep:
            raise SettingError("keep", False, "True, where the loss looks back at the model before training")
        base = frozen.reference.base
        return frozen.with_parts(**{part: trees.merge(frozen.parts[part], base[part]) for part in self.parts})

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd with the trained weights."""
        return frozen.with_parts(**{part: trees.merge(frozen.parts[part], trained[part]) for part in self.parts})
