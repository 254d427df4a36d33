"""The head of the only public encoder: tokens of the vision tower's last layer, each joined with the UNet's features.

    u   = W_2 LeakyReLU(W_0 [mean_hw m_k for all k] + b_0) + b_2                    10880 -> 1280 -> 1280 for SD 1.4
    h_0 = post_layernorm(class token),  h_i = token 2i of the last layer, i = 1 ...          128 of 256 patches
    E   = W LeakyReLU(mean_i (W_i (F [h_i, u] + f) + b_i)) + b                    F: 2560 -> 1280, shared; 129 maps W_i

The maps m_k come from the current UNet, with offsets and all trained weights, and get gradients.  The empty prompt and
the domain word's embedding get none.  The penalty squares v*, the whole embedding.
Source: the unofficial E4T of mkshing, e4t/encoder.py and tuning_e4t.py at commit a1d2593; tower tokens as in OpenCLIP
2.16, which normalises only the class token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num

from sdjax.methods.heads.head import Head, layer_shapes, linear, pooled
from sdjax.methods.seen import ENCODER, map_widths, seen_by, with_seen
from sdjax.models.clip import squashed_pixels
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.trees import Tree


@dataclass(frozen=True)
class Tokens(Head):
    """Weights with their names in encoder.pt: unet_feature_embedder, feature_linear, first_linears, final_linear."""

    features: str = "all"
    still = True

    def __post_init__(self):
        if self.features != "all":
            raise SettingError("features", self.features, "'all': a head of tokens pools every map")

    @staticmethod
    def matches(names: Sequence[str]) -> bool:
        """Returns whether there is a linear map for each token."""
        return any(name.startswith("first_linears.") for name in names)

    def shapes(self, sd: StableDiffusion) -> Tree:
        """Returns the shapes of the weights."""
        vision = sd.networks["image_encoder"].config
        width, tokens = vision.hidden_size, 1 + (vision.image_size // vision.patch_size) ** 2 // 2
        inputs = sum(map_widths(sd.networks["unet"].config))
        return {
            "unet_feature_embedder": {"0": layer_shapes(inputs, width), "2": layer_shapes(width, width)},
            "feature_linear": layer_shapes(2 * width, width),
            "first_linears": {str(i): layer_shapes(width, width) for i in range(tokens)},
            "final_linear": layer_shapes(width, sd.table(ENCODER).shape[1]),
        }

    def prepared(self, sd: StableDiffusion) -> StableDiffusion:
        """Returns sd without the pretrained copy of the UNet, since this head takes maps of the current UNet."""
        return with_seen(sd, unet=None, empty=None)

    def see(self, network: Any, tower: Tree, pixels: Float[Array, "B H W 3"]) -> Float32[Array, "B n D"]:
        """Returns the normalised class token and every second other token."""
        side = network.config.image_size
        tokens = network.apply({"params": tower}, squashed_pixels(pixels, side), method="tokens")
        return jnp.concatenate([tokens[:, :1], tokens[:, 2::2]], axis=1).astype(jnp.float32)

    def maps(
        self, sd: StableDiffusion, z: Float[Array, "B h w c"], t: Num[Array, " B"]
    ) -> Sequence[Float[Array, "B h w D"]]:
        """Returns the maps of the current UNet."""
        told = jax.lax.stop_gradient(sd.condition({ENCODER: seen_by(sd).nothing}).unet.context)
        _, maps = sd.call("unet", z, t, jnp.broadcast_to(told, (len(z), *told.shape[1:])), features_only=True)
        return maps

    def move(
        self, weights: Tree, features: Float[Array, "#B n D"], maps: Sequence[Float[Array, "B h w D"]]
    ) -> Float[Array, "B C"]:
        """Returns E by the module's formula."""
        embedder, first = weights["unet_feature_embedder"], weights["first_linears"]
        u = linear(embedder["0"], jnp.concatenate(pooled(maps), axis=1))
        u = linear(embedder["2"], jax.nn.leaky_relu(u))[:, None]  # [B 1 D]
        shape = (len(u), *features.shape[1:])
        beside = jnp.concatenate([jnp.broadcast_to(features, shape), jnp.broadcast_to(u, shape)], axis=2)
        mixed = linear(weights["feature_linear"], beside)  # [B n D]
        each = [linear(first[str(i)], mixed[:, i]) for i in range(len(first))]
        return linear(weights["final_linear"], jax.nn.leaky_relu(sum(each) / len(each)))

    def penalised(self, move: Float[Array, "B C"], vector: Float[Array, "B C"]) -> Float[Array, "B C"]:
        """Returns v*."""
        return vector
