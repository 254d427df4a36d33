"""A family of models with two text encoders, pooled text and the picture's size: SDXL's shape, for tests alone.

    sd = model()                                            # weights that are none of them zero
    sdjax.text2img(sd, ["a face"])

Source: Podell et al. 2023, "SDXL" (arXiv 2307.01952), sections 2.1 and 2.2; diffusers' StableDiffusionXLPipeline.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import tiny

from sdjax.diffusion.noise_schedule import Schedule
from sdjax.families.family import Family, Part
from sdjax.formats.models import folder
from sdjax.formats.models.presets import SENTENCES, SHAPES
from sdjax.formats.storage import parameters
from sdjax.models.clip import TextConfig, TextEncoder, pooled
from sdjax.models.cond import UNetInputs
from sdjax.models.layers import Dense, timestep_embedding
from sdjax.models.unet import TimeEmbedding, UNet, UNetConfig, example
from sdjax.models.vae import AutoencoderKL, VaeConfig
from sdjax.text.tokenizer import Tokenizer, train_vocabulary

PENULTIMATE = -2


@dataclass(frozen=True)
class XlConfig(UNetConfig):
    """A UNet's sizes, and those of what it is told beside the text."""

    addition_embed_type: str = "text_time"
    addition_time_embed_dim: int = 8
    projection_class_embeddings_input_dim: int = 0

    @classmethod
    def from_json(cls, options):
        own = {field.name for field in dataclasses.fields(cls)} - {
            field.name for field in dataclasses.fields(UNetConfig)
        }
        plain = UNetConfig.from_json({name: value for name, value in options.items() if name not in own})
        return cls(**vars(plain), **{name: options[name] for name in own})


class XlUNet(nn.Module):
    """The UNet whose time embedding also holds a text's pooled vector and the sines of six sizes."""

    config: XlConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        self.plain = UNet(self.config, self.dtype, self.remat)
        nn.share_scope(self, self.plain)  # its layers keep their names
        self.add_embedding = TimeEmbedding(4 * self.config.block_out_channels[0], self.dtype)

    def example(self):
        config = self.config
        wide = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**example(config), "pooled": jnp.zeros((1, wide)), "size": jnp.zeros((1, 6))}

    def __call__(self, z, t, context=None, class_labels=None, *, pooled, size, **more):
        config = self.config
        sines = timestep_embedding(size.reshape(-1), config.addition_time_embed_dim, config.flip_sin_to_cos, 0)
        told = jnp.concatenate([pooled, sines.reshape(len(size), -1)], axis=-1).astype(self.dtype)
        return self.plain(z, t, context, class_labels, added=self.add_embedding(told), **more)


class Projected(nn.Module):
    """CLIP's text tower with its projection into the embeddings that pictures share."""

    config: TextConfig
    dtype: Any = jnp.float32

    def setup(self):
        self.tower = TextEncoder(self.config, self.dtype)
        nn.share_scope(self, self.tower)
        self.text_projection = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype)

    def example(self):
        return {"ids": jnp.zeros((1, 1), jnp.int32), "method": "initialise"}

    def embed(self, ids):
        return self.tower.embed(ids)

    def states(self, rows):
        return self.tower.states(rows)

    def project(self, state, ids):
        """Returns the projection [B P] of each text's end, of the last state [B L C]."""
        return self.text_projection(pooled(self.tower.norm(state), ids, self.config.eos_token_id))

    def initialise(self, ids):
        return self.project(self.states(self.embed(ids))[-1], ids)


@dataclass(frozen=True)
class TwoEncoders(Family):
    """Both encoders' last states but one side by side, the second's pooled text, and the picture's size."""

    parts = {
        "unet": Part("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model", XlConfig, XlUNet),
        "vae": Part("diffusers", "AutoencoderKL", "diffusion_pytorch_model", VaeConfig, AutoencoderKL),
        "text_encoder": Part("transformers", "CLIPTextModel", "model", TextConfig, TextEncoder),
        "text_encoder_2": Part("transformers", "CLIPTextModelWithProjection", "model", TextConfig, Projected),
    }
    required = ("unet", "vae", "text_encoder", "text_encoder_2")
    tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    pipelines = ("StableDiffusionXLPipeline",)
    beside = {"force_zeros_for_empty_prompt": False}
    lora = {"unet": ("lora_unet",), "text_encoder": ("lora_te1",), "text_encoder_2": ("lora_te2",)}
    rows = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

    def encode(self, sd, encoder, rows, ids, skip):
        states = sd.call(encoder, rows, method="states")
        made = {"context": states[PENULTIMATE - skip]}
        if encoder == "text_encoder_2":
            made["pooled"] = sd.call(encoder, states[-1], ids, method="project")
        return made

    def inputs(self, encoded):
        context = jnp.concatenate([made["context"] for made in encoded.values()], axis=-1)
        return UNetInputs(context, pooled=encoded["text_encoder_2"]["pooled"])

    def told(self, sd, z, inputs):
        """Returns the inputs with (height, width, 0, 0, height, width): a picture that was not cut."""
        height, width = (side * sd.factor for side in z.shape[1:3])
        size = jnp.broadcast_to(jnp.array([height, width, 0, 0, height, width], jnp.float32), (len(z), 6))
        return inputs.replace(size=size)


def model():
    """Returns the tiny model of this family with noise in every weight."""
    shape = SHAPES["tiny"]
    tokenizers = {
        "text_encoder": Tokenizer.train(SENTENCES, 600, 16),
        "text_encoder_2": Tokenizer.of(*train_vocabulary(SENTENCES[:2], 560), 16, pad="!"),
    }
    texts = {"text_encoder": 32, "text_encoder_2": 48}
    configs: dict[str, Any] = {
        name: TextConfig(
            **{**shape["text_encoder"], "hidden_size": width, "projection_dim": 24, "num_hidden_layers": 3},
            vocab_size=tokenizers[name].size, bos_token_id=tokenizers[name].bos, eos_token_id=tokenizers[name].eos,
            pad_token_id=tokenizers[name].pad,
        )
        for name, width in texts.items()
    }  # fmt: skip
    sizes = {**shape["unet"], "cross_attention_dim": sum(texts.values()), "use_linear_projection": True}
    configs["unet"] = XlConfig(**sizes, projection_class_embeddings_input_dim=24 + 6 * 8)
    configs["vae"] = VaeConfig(**shape["vae"])
    networks = {name: part.network(configs[name]) for name, part in TwoEncoders.parts.items()}
    params = {name: tiny.noised(parameters.random_parameters(one, "float32")) for name, one in networks.items()}
    return folder.assemble(TwoEncoders(), networks, params, Schedule(), tokenizers)
