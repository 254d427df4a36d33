"""CLIP's two towers, and its preprocessing of pictures.

Submodules are named as in transformers' CLIPTextModel (with the prefix text_model) and CLIPVisionModelWithProjection.

Shapes: B batch, L tokens, C text width, N patches + 1, D vision width, P projection width, s picture side of the tower.

    text = TextEncoder(TextConfig.from_json(json.load(file)))
    context = text.apply(params, text.apply(params, ids, method="embed"), skip=0)  # [B L C]
    embeds, class_tokens, hidden = image.apply(params, clip_pixels(pixels, 224))  # [B P] [B layers D] [B N D]
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from sdjax.models import sizes
from sdjax.models.kernels.attention import attend
from sdjax.models.layers import Conv, Dense, LayerNorm, gelu, join_heads, split_heads

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of [0, 1] pictures; openai/CLIP, clip.py, _transform
STD = (0.26862954, 0.26130258, 0.27577711)  # the same source
LEGACY_EOS = 2  # wrong id in config.json files older than transformers PR 24773

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Largest accepted whole numbers in a config.json.
MOST = {"vocab_size": 1 << 22, "num_hidden_layers": 1024, "image_size": 1 << 13, **dict.fromkeys(TOKENS, 1 << 22)}

ACTIVATIONS = {
    "quick_gelu": jax.jit(lambda x: x * jax.nn.sigmoid(1.702 * x)),  # openai/CLIP, model.py, QuickGELU
    "gelu": gelu,  # the erf form; OpenCLIP's towers
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text_encoder/config.json of a diffusers folder, with the defaults of transformers' CLIPTextConfig."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config of a parsed config.json.  As in transformers, keys that CLIP does not use are ignored.

        Raises ValueError for another model type, a config of both towers, and unsupported options.
        """
        return _read(cls, values, "clip_text_model")

    @property
    def layers(self) -> int:
        """The layers, each of several weights."""
        return self.num_hidden_layers

    def to_json(self) -> dict[str, Any]:
        """Returns the dict for config.json that transformers' CLIPTextModel reads."""
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """The image_encoder/config.json of a diffusers folder, with the defaults of transformers' CLIPVisionConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config of a parsed config.json.  Raises the same errors as TextConfig.from_json."""
        config = _read(cls, values, "clip_vision_model")
        if config.num_channels != 3:
            raise ValueError(f"num_channels={config.num_channels!r}: pictures have 3 channels")
        if config.image_size < config.patch_size:
            raise ValueError(f"patch_size={config.patch_size}: at most image_size={config.image_size}")
        return config

    @property
    def layers(self) -> int:
        """The layers, each of several weights."""
        return self.num_hidden_layers

    def to_json(self) -> dict[str, Any]:
        """Returns the dict for config.json that transformers' CLIPVisionModelWithProjection reads."""
        kind = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}
        return {**kind, **dataclasses.asdict(self)}


def _read(cls, values, model_type):
    nested = [name for name in ("text_config", "vision_config") if values.get(name) is not None]
    if nested:
        raise ValueError(f"{nested[0]}: a CLIPConfig holds both towers; expected one tower's config ({model_type})")
    if values.get("model_type", model_type) != model_type:
        raise ValueError(f"model_type={values['model_type']!r}: expected {model_type!r}")
    if values.get("attention_dropout"):
        raise ValueError(f"attention_dropout={values['attention_dropout']!r}: only 0 is supported")
    known = {field.name: values.get(field.name, field.default) for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
        known[field.name] = _checked(field, known[field.name])
    config = cls(**known)
    sizes.check(config, "", TOKENS, MOST)
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act={config.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        heads, width = config.num_attention_heads, config.hidden_size
        raise ValueError(f"num_attention_heads={heads}: must divide hidden_size={width}")
    return config


def _checked(field, value):
    if value is None:
        return field.default
    if field.type is float and isinstance(value, int):
        value = float(value)
    if type(value) is not field.type:
        raise ValueError(f"{field.name}={value!r}: expected one {field.type.__name__}")
    if field.type is int and value < (0 if field.name.endswith("token_id") else 1):
        raise ValueError(f"{field.name}={value!r}: expected a positive number")
    return value


class TextEncoder(nn.Module):
    """CLIP's causal text tower: embed() looks up token rows; calling it runs the layers on the rows.

    Between the two, a caller may replace rows (textual inversion).  init with `method="initialise"`.
    """

    config: TextConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.text_model = _TextModel(self.config, self.dtype)

    def example(self) -> dict[str, Any]:
        """Returns the smallest call that touches all parameters."""
        return {"ids": jnp.zeros((1, 1), jnp.int32), "method": "initialise"}

    def embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        """Returns the token rows [B L C] of ids [B L], without positions; NaN for ids beyond the vocabulary."""
        return self.text_model.embeddings.token_embedding(ids)

    def __call__(self, embeddings: Float[Array, "B L C"], skip: int = 0) -> Float[Array, "B L C"]:
        """Returns the context [B L C]: positions added, causal layers without the last `skip`, final norm.

        skip: number of last layers to skip, 0 to num_hidden_layers - 1; diffusers' clip_skip.
        Raises ValueError for another skip and for more tokens than positions.
        """
        return self.text_model(embeddings, skip)

    def states(self, embeddings: Float[Array, "B L C"]) -> tuple[Float[Array, "B L C"], ...]:
        """Returns the input of the layers and each layer's output, all [B L C], before the final norm."""
        return self.text_model.states(embeddings)

    def norm(self, state: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
        """Returns a state [B L C] after the final norm."""
        return self.text_model.final_layer_norm(state)

    def initialise(self, ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        """Returns the context of ids [B L]; touches every parameter."""
        return self(self.embed(ids))


class ImageEncoder(nn.Module):
    """CLIP's vision transformer with its projection."""

    config: ImageConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        start = nn.initializers.normal(self.config.hidden_size**-0.5)
        self.vision_model = _VisionModel(self.config, self.dtype)
        self.visual_projection = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, kernel_init=start)

    def example(self) -> dict[str, Any]:
        """Returns the smallest inputs that touch all parameters."""
        return {"pixels": jnp.zeros((1, self.config.image_size, self.config.image_size, 3))}

    def __call__(
        self, pixels: Float[Array, "B s s 3"]
    ) -> tuple[Float[Array, "B P"], Float[Array, "B layers D"], Float[Array, "B N D"]]:
        """Returns (embeds [B P], class_tokens [B layers D], hidden [B N D]) of CLIP-normalised pixels [B s s 3].

        embeds = projection(post_layernorm(class token)).  class_tokens: the class token after each block.  hidden: the
        last block's output.  Both are before post_layernorm.
        Raises ValueError for pictures whose side is not image_size.
        """
        states = self.states(pixels)
        embeds = self.visual_projection(self.vision_model.post_layernorm(states[-1][:, 0]))
        return embeds, jnp.stack([state[:, 0] for state in states[1:]], axis=1), states[-1]

    def tokens(self, pixels: Float[Array, "B s s 3"]) -> Float[Array, "B N D"]:
        """Returns the last block's output [B N D], with post_layernorm only on the class token, the first one.

        This is the output of OpenCLIP 2.16's towers with output_tokens and without a projection; later versions norm
        all tokens.
        """
        last = self.states(pixels)[-1]
        return jnp.concatenate([self.vision_model.post_layernorm(last[:, :1]), last[:, 1:]], axis=1)

    def states(self, pixels: Float[Array, "B s s 3"]) -> tuple[Float[Array, "B N D"], ...]:
        """Returns the tuple of all hidden states [B N D]: the normed input of the blocks, then each block's output."""
        return self.vision_model(pixels)


class _TextEmbeddings(nn.Module):
    config: TextConfig
    dtype: Any

    def setup(self):
        config = self.config
        self.token_embedding = _embed(config.vocab_size, config.hidden_size, 0.02, self.dtype)
        self.position_embedding = _embed(config.max_position_embeddings, config.hidden_size, 0.01, self.dtype)


class _TextModel(nn.Module):
    config: TextConfig
    dtype: Any

    def setup(self):
        self.embeddings = _TextEmbeddings(self.config, self.dtype)
        self.encoder = _Blocks(self.config, self.dtype)
        self.final_layer_norm = LayerNorm(self.config.layer_norm_eps, self.dtype)

    def __call__(self, embeddings, skip):
        if not 0 <= skip < self.config.num_hidden_layers:
            raise ValueError(f"skip={skip}: expected 0 to {self.config.num_hidden_layers - 1}")
        return self.final_layer_norm(self.states(embeddings)[-1 - skip])

    def states(self, embeddings):
        length, most = embeddings.shape[1], self.config.max_position_embeddings
        if length > most:
            raise ValueError(f"{length} tokens: the text encoder takes at most {most} (max_position_embeddings)")
        positions = self.embeddings.position_embedding(jnp.arange(length)[None])  # [1 L C]
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]  # [1 1 L L]
        return self.encoder(embeddings.astype(self.dtype) + positions, causal)


class _ImageEmbeddings(nn.Module):
    config: ImageConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels):
        width, patch, side = self.config.hidden_size, self.config.patch_size, self.config.image_size
        if pixels.shape[1:] != (side, side, 3):
            raise ValueError(f"picture of shape {pixels.shape[1:]}: the image encoder takes {(side, side, 3)}")
        options = {"strides": patch, "padding": 0, "use_bias": False, "dtype": self.dtype}
        patches = Conv(width, patch, **options, name="patch_embedding")(pixels)
        patches = patches.reshape(len(patches), -1, width)  # [B N-1 D]
        first = self.param("class_embedding", nn.initializers.normal(width**-0.5), (width,)).astype(self.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(first, (len(patches), 1, width)), patches], axis=1)  # [B N D]
        table = _embed(tokens.shape[1], width, width**-0.5, self.dtype, name="position_embedding")
        return tokens + table(jnp.arange(tokens.shape[1])[None])


class _VisionModel(nn.Module):
    config: ImageConfig
    dtype: Any

    def setup(self):
        norm = (self.config.layer_norm_eps, self.dtype)
        self.embeddings = _ImageEmbeddings(self.config, self.dtype)
        self.pre_layrnorm = LayerNorm(*norm)  # the spelling of the checkpoints
        self.encoder = _Blocks(self.config, self.dtype)
        self.post_layernorm = LayerNorm(*norm)

    def __call__(self, pixels):
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)), None)


class _Blocks(nn.Module):
    config: TextConfig | ImageConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(_Block(self.config, self.dtype, name=f"layers.{i}")(states[-1], mask))
        return tuple(states)


class _Block(nn.Module):
    config: TextConfig | ImageConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        norm = (self.config.layer_norm_eps, self.dtype)
        x = x + _Attention(self.config, self.dtype, name="self_attn")(LayerNorm(*norm, name="layer_norm1")(x), mask)
        return x + _Mlp(self.config, self.dtype, name="mlp")(LayerNorm(*norm, name="layer_norm2")(x))


class _Attention(nn.Module):
    config: TextConfig | ImageConfig
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        width = self.config.hidden_size
        q, k, v = (_dense(width, width**-0.5, self.dtype, f"{name}_proj")(x) for name in "qkv")
        q, k, v = (split_heads(rows, self.config.num_attention_heads) for rows in (q, k, v))
        out = join_heads(self.attend(q, k, v, mask))
        return _dense(width, _residual_std(self.config), self.dtype, "out_proj")(out)

    def attend(
        self,
        q: Float[Array, "B N heads d"],
        k: Float[Array, "B M heads d"],
        v: Float[Array, "B M heads d"],
        mask: Bool[Array, "#B #heads #N #M"] | None = None,
    ) -> Float[Array, "B N heads d"]:
        """Returns the attention [B N heads d] of q, k, v [B N heads d]; a method, so that hooks can wrap it."""
        return attend(q, k, v, mask)


class _Mlp(nn.Module):
    config: TextConfig | ImageConfig
    dtype: Any

    @nn.compact
    def __call__(self, x):
        width = self.config.hidden_size
        hidden = _dense(self.config.intermediate_size, (2 * width) ** -0.5, self.dtype, "fc1")(x)
        hidden = ACTIVATIONS[self.config.hidden_act](hidden)
        return _dense(width, _residual_std(self.config), self.dtype, "fc2")(hidden)


# Initial standard deviations: openai/CLIP, model.py, initialize_parameters.
def _residual_std(config):
    return (2 * config.hidden_size * config.num_hidden_layers) ** -0.5


def _dense(features, std, dtype, name):
    return Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(std), name=name)


def _embed(rows, width, std, dtype, name=None):
    return nn.Embed(rows, width, dtype=dtype, embedding_init=nn.initializers.normal(std), name=name)


def pooled(hidden: Float[Array, "B L C"], ids: Int[Array, "B L"], eos: int) -> Float[Array, "B C"]:
    """Returns the row of each text's first EOS token [B C], or row 0 without one.

    hidden: output of TextEncoder [B L C].  ids: int [B L].  eos: config.eos_token_id.  Old config.json files have eos =
    2 although the true EOS is the largest id; then the row of the largest id is taken.
    Source: transformers, CLIPTextModel.
    """
    position = jnp.argmax(ids if eos == LEGACY_EOS else ids == eos, axis=1)
    return jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]


def clip_pixels(pixels: Float[Array, "B H W 3"], size: int) -> Float32[Array, "B size size 3"]:
    """Returns the input of CLIP's towers, [B size size 3] float32: resized, cropped, (x - MEAN) / STD.

    pixels: [B H W 3] in [-1, 1].  The shorter side is resized to `size`, and the longer is cropped at the centre.
    The resize is bicubic with Keys' a = -0.5 and antialiasing, as Pillow's BICUBIC and torch's with antialias=True
    (equal to 1e-5 in tests).  Unlike transformers' processor, it does not round to 1/255 in between.
    """
    batch, height, width, channels = pixels.shape
    short = min(height, width)
    height, width = height * size // short, width * size // short
    unit = pixels.astype(jnp.float32) / 2 + 0.5
    unit = jax.image.resize(unit, (batch, height, width, channels), "cubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    unit = jnp.clip(unit[:, top : top + size, left : left + size], 0, 1)
    return (unit - jnp.array(MEAN)[None, None, None]) / jnp.array(STD)[None, None, None]


def squashed_pixels(pixels: Float[Array, "B H W 3"], size: int) -> Float32[Array, "B size size 3"]:
    """Returns the input of latent-diffusion's image encoders, [B size size 3] float32: resized, (x - MEAN) / STD.

    pixels: [B H W 3] in [-1, 1].  Both sides are resized to `size`: bicubic with Keys' a = -0.75, aligned corners and
    no antialiasing, so that some pixels may have no effect.
    Source: FrozenClipImageEmbedder of CompVis latent-diffusion (kornia's resize, align_corners, antialias=False).
    """
    rows, columns = (_cubic(side, size) for side in pixels.shape[1:3])
    unit = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, pixels.astype(jnp.float32), precision="highest") / 2 + 0.5
    return (unit - jnp.array(MEAN)[None, None, None]) / jnp.array(STD)[None, None, None]


def _cubic(side: int, size: int) -> Float32[np.ndarray, "size side"]:
    """Returns the matrix of a bicubic resize from `side` numbers to `size`, as torch's with align_corners."""
    places = np.arange(size) * ((side - 1) / max(size - 1, 1))
    below, a, matrix = np.floor(places).astype(int), -0.75, np.zeros((size, side))
    for step in (-1, 0, 1, 2):
        x = np.abs(places - below - step)
        near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        np.add.at(matrix, (np.arange(size), np.clip(below + step, 0, side - 1)), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)
