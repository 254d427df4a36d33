"""Contrastive text-image training of the text and image encoders.

    Clip()             with batches of {"pixels", "ids"}; the loss is over the whole global batch
    Clip(parts=())     the text projection and the temperature alone, between encoders as they are

The text projection and the temperature have no part in a diffusers model; sd.reference.clip holds them, and on disk the
folder clip/.

Source: Radford et al. 2021 (arXiv 2103.00020), figure 3, with its temperature: learned and at most 100.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sdjax import trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method
from sdjax.models.clip import clip_pixels, pooled
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

ENCODER = "text_encoder"  # the trained text encoder
TOWERS = (ENCODER, "image_encoder")


@dataclass(frozen=True)
class Clip(Method):
    """Trains the text and image encoders, the text projection and the temperature, contrastively.

    The loss needs the whole batch at once.
    parts: the encoders to train; the others stay as they are.
    Source of frozen encoders: Zhai et al. 2022, "LiT" (arXiv 2111.07991).
    """

    parts: tuple[str, ...] = TOWERS
    pixels = True
    whole_batch = True  # accumulation would change the loss, so the training loop refuses it
    formats = ()

    def __post_init__(self):
        for name in self.parts:
            if name not in TOWERS:
                raise SettingError("parts", name, " or ".join(TOWERS))

    def preview(self, sd: StableDiffusion, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns {}: it has no previews."""
        return {}

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns None: a whole model, with the folder clip/."""
        return None

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({"text_encoder", "image_encoder", "text_projection" [C P], "logit_scale"}, sd without them).

        Encoders that are not in `parts` stay in sd.
        Projection and temperature continue from the model's own; without them they start as in CLIP.
        Raises ValueError if the model has no image encoder.
        """
        if "image_encoder" not in sd.parts:
            raise ValueError("method=Clip: the model has no image_encoder; give it one with vision=FOLDER")
        width, out = sd.networks["text_encoder"].config.hidden_size, sd.networks["image_encoder"].config.projection_dim
        held = sd.reference.clip
        if held is not None:
            held = trees.copy(held, jnp.float32)
            kernel, scale = held["text_projection"]["kernel"], held["logit_scale"]
        else:
            scale = jnp.log(jnp.float32(1 / 0.07))  # the paper's starting temperature
            kernel = jax.ShapeDtypeStruct((width, out), jnp.float32)
            if key is not None:
                kernel = jax.random.normal(key, kernel.shape) * width**-0.5  # CLIP's initialisation
        towers = {name: trees.copy(sd.parts[name], jnp.float32) for name in TOWERS if name in self.parts}
        trained = {**towers, "text_projection": kernel, "logit_scale": scale}
        return trained, sd.with_reference(clip=None).with_parts(**dict.fromkeys(towers, {}))

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd with the trained encoders, projection and temperature."""
        held = {"text_projection": {"kernel": trained["text_projection"]}, "logit_scale": trained["logit_scale"]}
        return frozen.with_reference(clip=held).with_parts(
            **{name: trained[name] for name in TOWERS if name in trained}
        )

    def loss(
        self,
        frozen: StableDiffusion,
        trained: Any,
        batch: dict[str, Any],
        key: Array,
        step: Array,
        axis: str | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns (mean of both cross entropies of scale * cos(image_i, text_j) over the global batch, metrics).

        axis: the mapped axis that embeddings are gathered over, if the batch is split (pmap).
        """
        sd = self.join(frozen, trained)
        image = embed_images(sd, batch["pixels"])
        text = embed_texts(sd, batch["ids"][ENCODER], trained["text_projection"])
        labels = jnp.arange(len(image))
        all_image, all_text = image, text
        if axis is not None:
            all_image, all_text = (jax.lax.all_gather(x, axis, tiled=True) for x in (image, text))
            labels = labels + jax.lax.axis_index(axis) * len(image)
        scale = jnp.exp(jnp.minimum(trained["logit_scale"], jnp.log(100.0)))
        by_image, by_text = scale * image @ all_text.T, scale * text @ all_image.T  # [B G]
        entropy = optax.softmax_cross_entropy_with_integer_labels
        loss = (entropy(by_image, labels).mean() + entropy(by_text, labels).mean()) / 2
        return loss, {"accuracy": jnp.mean(jnp.argmax(by_image, axis=1) == labels)}


def embed_images(sd: StableDiffusion, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B P"]:
    """Returns unit image embeddings [B P] of pixels [B H W 3] in [-1, 1]."""
    seen = clip_pixels(pixels, sd.networks["image_encoder"].config.image_size)
    return _unit(sd.call("image_encoder", seen)[0])


def embed_texts(sd: StableDiffusion, ids: Int[Array, "B L"], projection: Float[Array, "C P"]) -> Float[Array, "B P"]:
    """Returns unit text embeddings [B P]: the output at the first end token [B C] times projection [C P]."""
    hidden = sd.encode_text(ENCODER, sd.embed(ENCODER, ids))
    return _unit(pooled(hidden, ids, sd.tokenizers[ENCODER].eos) @ projection)


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
