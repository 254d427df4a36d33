"""The paper's head, from class tokens of every second layer of the vision tower and maps of the pretrained UNet.

    E = W [ LeakyReLU(mean_l (W_l c_l + b_l)), LeakyReLU(mean_hw m_k) for all k ] + b,    c_l: layers l = 2, 4, ...

Source: Gal et al. 2023 (arXiv 2302.12228), section 4 and figure 2.  Our choices where the paper is open: one linear map
per layer, the pooled maps m_k, and W and b that start at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key, Num

from sdjax.methods.heads.head import Head, layer_shapes, linear, pooled
from sdjax.methods.seen import ENCODER, level_maps, map_widths, seen_by
from sdjax.models.clip import clip_pixels
from sdjax.stable_diffusion import StableDiffusion
from sdjax.trees import Tree


@dataclass(frozen=True)
class Layers(Head):
    """Weights {"clip": {layer: linear D -> D}, "final": linear -> C}."""

    features: str = "all"

    @staticmethod
    def matches(names: Sequence[str]) -> bool:
        """Returns whether there is a linear map for each layer."""
        return any(name.startswith("clip.") for name in names)

    def shapes(self, sd: StableDiffusion) -> Tree:
        """Returns the shapes of the weights."""
        vision, config = sd.networks["image_encoder"].config, sd.networks["unet"].config
        width, maps = vision.hidden_size, map_widths(config)
        inputs = sum(maps[i] for i in level_maps(config)) if self.features == "level" else sum(maps)
        clip = {str(i): layer_shapes(width, width) for i in range(vision.num_hidden_layers // 2)}
        return {"clip": clip, "final": layer_shapes(width + inputs, sd.table(ENCODER).shape[1])}

    def create(self, sd: StableDiffusion, key: Key[Array, ""]) -> Tree:
        """Returns the initial weights for pre-training; the last linear map is zero, and therefore E."""
        like = self.shapes(sd)
        shape = like["clip"]["0"]["kernel"].shape
        kernels = jax.random.normal(key, (len(like["clip"]), *shape)) * shape[0] ** -0.5
        clip = {name: {"kernel": kernels[int(name)], "bias": jnp.zeros(shape[1])} for name in like["clip"]}
        return {"clip": clip, "final": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like["final"])}

    def see(self, network: Any, tower: Tree, pixels: Float[Array, "B H W 3"]) -> Float32[Array, "B n D"]:
        """Returns the class tokens of all layers."""
        _, classes, _ = network.apply({"params": tower}, clip_pixels(pixels, network.config.image_size))
        return classes.astype(jnp.float32)

    def maps(
        self, sd: StableDiffusion, z: Float[Array, "B h w c"], t: Num[Array, " B"]
    ) -> Sequence[Float[Array, "B h w D"]]:
        """Returns the pretrained UNet's maps, without offsets and hooks."""
        seen = seen_by(sd)
        empty = jnp.broadcast_to(seen.empty, (len(z), *seen.empty.shape[1:]))
        _, maps = sd.networks["unet"].apply({"params": seen.unet}, z, t, empty, features_only=True)
        return [maps[k] for k in level_maps(sd.networks["unet"].config)] if self.features == "level" else maps

    def move(
        self, weights: Tree, features: Float[Array, "#B n D"], maps: Sequence[Float[Array, "B h w D"]]
    ) -> Float[Array, "B C"]:
        """Returns E by the module's formula."""
        ordered = sorted((int(name), layer) for name, layer in weights["clip"].items())
        layers = [linear(layer, features[:, 2 * k + 1]) for k, layer in ordered]  # layers 2, 4, ... counted from 1
        clip = jax.nn.leaky_relu(sum(layers) / len(layers))  # slope 0.01, torch's default
        clip = jnp.broadcast_to(clip, (len(maps[0]), clip.shape[1]))
        seen = [clip, *map(jax.nn.leaky_relu, pooled(maps))]
        return linear(weights["final"], jnp.concatenate(seen, axis=1))
