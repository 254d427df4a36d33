"""Full fine-tuning of any weights, chosen by part and by regular expression: fine-tuning, DreamBooth, Custom Diffusion.

Full(("unet", "text_encoder"))
Full(("unet",), r"attn2\\.to_(k|v)\\.kernel$")        # the weights of Custom Diffusion
"""

from dataclasses import dataclass

import jax.numpy as jnp

from sdjax import settings, trees


@dataclass(frozen=True)
class Full:
    """Trains the weights of `parts` whose dotted name within the part matches `pattern`; the others stay frozen."""

    parts: tuple[str, ...] = ("unet",)
    pattern: str = ""

    def __post_init__(self):
        settings.check_pattern("method.pattern", self.pattern)

    def split(self, sd, key):
        """Returns ({part: chosen weights, float32 copies}, sd without them).

        Raises ValueError when a part is not of this model or nothing matches.
        """
        trained, rest = {}, {}
        for part in self.parts:
            tree = getattr(sd, part, None)
            if not isinstance(tree, dict):
                raise ValueError(
                    f"method.parts={part!r}: no such part; accepted: unet, vae, text_encoder, image_encoder"
                )
            chosen, rest[part] = trees.partition(tree, self.pattern)
            if not chosen:
                raise ValueError(f"method.pattern={self.pattern!r}: matches no weight of {part}")
            trained[part] = trees.copy(trees.cast(chosen, jnp.float32))
        return trained, sd.replace(**rest)

    def join(self, frozen, trained, key=None):
        """Returns sd with the trained weights in their places."""
        return frozen.replace(**{part: trees.merge(getattr(frozen, part), trained[part]) for part in self.parts})
