"""Custom Diffusion: trains the keys and values of cross-attention; TextualInversion trains the words.

    Chain((TextualInversion("<new1>", init="ktn"), CustomDiffusion()))

In training, the key and value of the first token (start of text) get no gradient, because every prompt contains it.
Source: Kumari et al. 2023, "Multi-Concept Customization of Text-to-Image Diffusion" (arXiv 2212.04488); for the first
token, the authors' code and diffusers' CustomDiffusionAttnProcessor.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Key

from sdjax import trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.edits import Factored
from sdjax.methods.method import Method, about
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

READING = r"attn2\.to_(k|v)\.kernel$"  # keys and values of the text
ALL = r"attn2\.to_(k|v|q|out\.0)\."


@dataclass(frozen=True)
class CustomDiffusion(Method):
    """Trains the key and value projections of every cross-attention in the UNet.

    query: also train to_q and to_out, as with diffusers' freeze_model=crossattn.
    """

    query: bool = False
    formats = ("custom_diffusion",)

    def split(self, sd: StableDiffusion, key: Key[Array, ""] | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({"unet": float32 copies of the chosen weights}, sd unchanged).

        Raises SettingError for a model whose UNet reads no text.
        """
        chosen, _ = trees.partition(sd.parts["unet"], ALL if self.query else READING)
        if not chosen:
            raise SettingError("class", type(self).__name__, "a method for this model, whose UNet reads no text")
        return {"unet": trees.copy(chosen, jnp.float32)}, sd

    def join(self, frozen: StableDiffusion, trained: Any, key: Key[Array, ""] | None = None) -> StableDiffusion:
        """Returns sd with the trained weights; with a key it adds the hook for training."""
        sd = frozen.with_parts(unet=trees.merge(frozen.parts["unet"], trained["unet"]))
        return sd if key is None else sd.add(hooks=Start())

    def edited(self, trained: Any) -> set[str]:
        """Returns the names of the weights that train."""
        return {f"unet.{name}" for name in trees.names(trained["unet"])}

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the trained weights as edits that replace the model's."""
        weights = trees.flatten(trained["unet"])
        edits = {
            name: Factored({"whole": np.asarray(weight, np.float32).T, "scale": np.float32(1)})
            for name, weight in weights.items()
        }
        return Adapter(edits={"unet": edits}, about=about(self))


class Start(struct.PyTreeNode):
    """A hook that stops the gradient of the first token's key and value in every cross-attention."""

    def intercept(self, part: str, layer: Any, args: tuple, kwargs: dict, at: Any, cond: Any) -> Any:
        """Returns the layer's output, without a gradient for the first token."""
        if part == "unet" and at.method_name == "attend" and at.module.name == "attn2":
            q, k, v = args
            args = q, _still(k), _still(v)
        return layer(*args, **kwargs)


def _still(rows: Float[Array, "B M heads d"]) -> Float[Array, "B M heads d"]:
    return jnp.concatenate([jax.lax.stop_gradient(rows[:, :1]), rows[:, 1:]], axis=1)
