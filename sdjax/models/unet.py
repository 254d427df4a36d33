"""The denoising network of Stable Diffusion 1.x and 2.x: a UNet with cross-attention to a text.

Without a text (cross_attention_dim None), maps attend to themselves: this is LDM-SR's UNet, diffusers' UNet2DModel.
B batch, h w latent pixels, L tokens, C text width, D channels, N positions, T width of the time embedding.  Submodule
names are the keys of diffusers' UNet2DConditionModel, so a weight's dotted name is its name in the file.

    config = UNetConfig.from_json(json.load(open("unet/config.json")))
    unet = UNet(config, dtype=jnp.bfloat16)
    prediction, features = unet.apply({"params": params}, z, t, context)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from sdjax.models import sizes
from sdjax.models.kernels.attention import attend
from sdjax.models.layers import (
    Conv,
    Dense,
    Downsample,
    GroupNorm,
    LayerNorm,
    MapAttention,
    ResnetBlock,
    Upsample,
    gelu,
    join_heads,
    split_heads,
    timestep_embedding,
    zeros,
)
from sdjax.models.recompute import product, recomputed

# Options of UNet2DConditionModel with one supported value; several values have the same meaning.
FIXED = {
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0,),
    "act_fn": ("silu", "swish"),
    "transformer_layers_per_block": (1,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "projection_class_embeddings_input_dim": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}

# Options of UNet2DModel, likewise.
FIXED_PLAIN = {
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "attn_norm_num_groups": (None,),
    "add_attention": (True,),
    "num_train_timesteps": (None,),
}
CONDITIONAL = ("cross_attention_dim", "only_cross_attention", "use_linear_projection", "upcast_attention")
PLAIN, ATTENTIVE = ("AttnDownBlock2D", "AttnUpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")

# Options without effect on these blocks, and leftovers of averaged weights in a config.json.
IGNORED = {
    "mid_block_only_cross_attention",
    "addition_embed_type_num_heads",
    "decay",
    "min_decay",
    "inv_gamma",
    "power",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
}
Maps = tuple[Float[Array, "B _ _ _"], ...]  # maps of several levels


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The sizes of a UNet, with the names and defaults of its config.json; lists are tuples here.

    attention_head_dim: the number of heads, for all levels or one per level (the file's name is historical).
    layers_per_block, only_cross_attention: likewise for all levels or one per level, finest first.
    num_class_embeds: rows of the table of class labels (noise levels of the x4 upscaler), or None.
    cross_attention_dim: width of the text; None for a UNet without text, whose blocks have types Attn...
    Raises ValueError if the sizes do not fit each other.
    Source: the format of diffusers' UNet2DConditionModel.
    """

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | None = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    num_class_embeds: int | None = None
    upcast_attention: bool = False

    def __post_init__(self):
        sizes.check(self, "unet", ("freq_shift",), {"num_class_embeds": 1 << 20, "layers_per_block": 64})
        levels = len(self.block_out_channels)
        down, up = PLAIN if self.cross_attention_dim is None else ATTENTIVE
        allowed = {"down_block_types": (down, "DownBlock2D"), "up_block_types": (up, "UpBlock2D")}
        for name, kinds in allowed.items():
            value = getattr(self, name)
            if len(value) != levels or not set(value) <= set(kinds):
                raise ValueError(f"unet {name}={value}: expected {levels} of {kinds}, one per block_out_channels")
        for name in ("only_cross_attention", "layers_per_block", "attention_head_dim"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"unet {name}={value}: expected one value or {levels}, one per block_out_channels")
        for width, heads in zip(self.block_out_channels, self.levels("attention_head_dim"), strict=True):
            if width % self.norm_num_groups:
                raise ValueError(f"unet norm_num_groups={self.norm_num_groups}: must divide block_out_channels {width}")
            if width % heads:
                raise ValueError(f"unet attention_head_dim={heads} (number of heads): must divide {width} channels")

    def levels(self, name: str) -> tuple[Any, ...]:
        """Returns an option's values, one per level, finest level first."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> Self:
        """Returns the config of a parsed config.json.

        Raises ValueError naming an option that is unknown or has an unsupported value.
        """
        known, fixed = {field.name for field in dataclasses.fields(cls)}, FIXED
        if options.get("_class_name") == "UNet2DModel":
            options, fixed = _without_text(options), FIXED | FIXED_PLAIN
        for name, value in options.items():
            if name in fixed and value not in fixed[name]:
                raise ValueError(f"unet {name}={value!r} is not supported; expected {fixed[name][0]!r}")
            if not name.startswith("_") and name not in known | fixed.keys() | IGNORED:
                raise ValueError(f"unet {name}={value!r}: unknown option; supported are {', '.join(sorted(known))}")
        found: dict[str, Any] = {name: value for name, value in options.items() if name in known}
        found |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of a config.json that gives the same network in diffusers."""
        options = dataclasses.asdict(self)
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        if self.cross_attention_dim is not None:
            return {"_class_name": "UNet2DConditionModel", **options}
        for name in CONDITIONAL:
            del options[name]
        return {"_class_name": "UNet2DModel", **options, "attention_head_dim": self.head_width}

    @property
    def layers(self) -> int:
        """The number of residual blocks in the down half, each with several weights."""
        return sum(self.levels("layers_per_block"))

    @property
    def head_width(self) -> int:
        """Channels of one attention head.  Raises ValueError if levels differ, since UNet2DModel has one value."""
        pairs = zip(self.block_out_channels, self.levels("attention_head_dim"), strict=True)
        widths = {width // heads for width, heads in pairs}
        if len(widths) > 1:
            raise ValueError(f"unet attention_head_dim={self.attention_head_dim}: expected heads of one width")
        return widths.pop()


def _without_text(options):
    """Returns a UNet2DModel's options as UNetConfig's; UNet2DModel's attention_head_dim is the width of a head."""
    defaults: dict[str, Any] = dict(in_channels=3, out_channels=3, attention_head_dim=8)
    defaults["block_out_channels"] = (224, 448, 672, 896)
    defaults |= {"down_block_types": ("DownBlock2D", *PLAIN[:1] * 3), "up_block_types": (*PLAIN[1:] * 3, "UpBlock2D")}
    options = {**defaults, **options, "cross_attention_dim": None}
    widths, head = options["block_out_channels"], options["attention_head_dim"]
    return options | {"attention_head_dim": tuple(width // (head or width) for width in widths)}


class Attention(nn.Module):
    """Multi-head attention of x [B N D] to itself or to a context [B L C], with its projections."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], context: Float[Array, "B L C"] | None = None) -> Float[Array, "B N D"]:
        width, source = x.shape[-1], x if context is None else context
        q = Dense(width, use_bias=False, dtype=self.dtype, name="to_q")(x)
        k = Dense(width, use_bias=False, dtype=self.dtype, name="to_k")(source)
        v = Dense(width, use_bias=False, dtype=self.dtype, name="to_v")(source)
        out = self.attend(*(split_heads(rows, self.heads) for rows in (q, k, v)))
        return Dense(width, dtype=self.dtype, name="to_out.0")(join_heads(out))

    def attend(
        self, q: Float[Array, "B N heads d"], k: Float[Array, "B M heads d"], v: Float[Array, "B M heads d"]
    ) -> Float[Array, "B N heads d"]:
        """Returns the attention [B N heads d] of q [B N heads d] to k, v [B M heads d]; a method, so hooks can wrap it.

        Scores are float32 in every compute type, so a config's upcast_attention changes nothing.
        """
        return product(attend(q, k, v))


class FeedForward(nn.Module):
    """A gated feed-forward layer W2 (a * gelu(b)), [a b] = W1 x, four times as wide inside.

    Source: Shazeer 2020, GEGLU, with the exact gelu.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        width = x.shape[-1]
        value, gate = jnp.split(Dense(8 * width, dtype=self.dtype, name="net.0.proj")(x), 2, axis=-1)
        return Dense(width, dtype=self.dtype, name="net.2")(value * gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention (attention to the context if only_cross), attention to the context, feed-forward; on [B N D]."""

    heads: int
    only_cross: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], context: Float[Array, "B L C"] | None) -> Float[Array, "B N D"]:
        def norm(name):
            return LayerNorm(dtype=self.dtype, name=name)

        def attention(name):
            return Attention(self.heads, self.dtype, name=name)

        x = x + attention("attn1")(norm("norm1")(x), context if self.only_cross else None)
        x = x + attention("attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class Transformer(nn.Module):
    """A transformer block on the positions of a map [B h w D], between two projections, with a residual connection."""

    config: UNetConfig
    level: int
    only_cross: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"], context: Float[Array, "B L C"] | None) -> Float[Array, "B h w D"]:
        config, width = self.config, x.shape[-1]
        heads = config.levels("attention_head_dim")[self.level]

        def projection(name, **options):
            if config.use_linear_projection:
                return Dense(width, dtype=self.dtype, name=name, **options)
            return Conv(width, 1, dtype=self.dtype, name=name, **options)

        # This norm has its own epsilon, 1e-6: ldm/modules/attention.py.
        y = GroupNorm(config.norm_num_groups, 1e-6, self.dtype, name="norm")(x)
        y = projection("proj_in")(y).reshape(len(x), -1, width)  # [B N D]
        block = TransformerBlock(heads, self.only_cross, self.dtype, name="transformer_blocks.0")
        y = block(y, context).reshape(x.shape)
        return x + projection("proj_out", kernel_init=zeros)(y)


@dataclasses.dataclass(frozen=True)
class Layers:
    """Creates the residual blocks and transformers of one level inside a Linen module; remat: see UNet."""

    config: UNetConfig
    level: int
    dtype: Any = jnp.float32
    remat: bool | str = False

    @property
    def width(self) -> int:
        return self.config.block_out_channels[self.level]

    def resnet(self, i: int) -> ResnetBlock:
        block = recomputed(ResnetBlock, self.remat)
        config = self.config
        return block(self.width, config.norm_num_groups, config.norm_eps, True, self.dtype, name=f"resnets.{i}")

    def transform(
        self, i: int, x: Float[Array, "B h w D"], context: Float[Array, "B L C"] | None, only_cross: bool = False
    ) -> Float[Array, "B h w D"]:
        """Returns the map x [B h w D] after a transformer or, without a text, after self-attention."""
        config, name = self.config, f"attentions.{i}"
        if config.cross_attention_dim is None:
            block, heads = recomputed(MapAttention, self.remat), config.levels("attention_head_dim")
            return block(heads[self.level], config.norm_num_groups, config.norm_eps, self.dtype, name=name)(x)
        block = recomputed(Transformer, self.remat)
        return block(config, self.level, only_cross, self.dtype, name=name)(x, context)


class DownBlock(nn.Module):
    """A level of the down half: returns the maps after each layer and, except at the coarsest level, after halving."""

    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w in"], time: Float[Array, "B T"], context: Float[Array, "B L C"] | None
    ) -> list[Float[Array, "B _ _ D"]]:
        layers, config, level = self.layers, self.layers.config, self.layers.level
        attention = config.down_block_types[level] != "DownBlock2D"
        maps = []
        for i in range(config.levels("layers_per_block")[level]):
            x = layers.resnet(i)(x, time)
            if attention:
                x = layers.transform(i, x, context, config.levels("only_cross_attention")[level])
            maps.append(x)
        if level + 1 < len(config.block_out_channels):
            maps.append(Downsample(layers.width, dtype=layers.dtype, name="downsamplers.0")(x))
        return maps


class MidBlock(nn.Module):
    """The coarsest map: residual block, transformer, residual block."""

    layers: Layers

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w D"], time: Float[Array, "B T"], context: Float[Array, "B L C"] | None
    ) -> Float[Array, "B h w D"]:
        x = self.layers.resnet(0)(x, time)
        x = self.layers.transform(0, x, context)
        return self.layers.resnet(1)(x, time)


class UpBlock(nn.Module):
    """A level of the up half: each layer also takes the last remaining skip map; then resizes to `size` unless None."""

    layers: Layers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B h w in"],
        skips: Sequence[Float[Array, "B h w _"]],
        time: Float[Array, "B T"],
        context: Float[Array, "B L C"] | None,
        size: Sequence[int] | None = None,
    ) -> Float[Array, "B _ _ D"]:
        layers, config, level = self.layers, self.layers.config, self.layers.level
        attention = config.up_block_types[-1 - level] != "UpBlock2D"
        for i, skip in enumerate(reversed(skips)):
            x = layers.resnet(i)(jnp.concatenate([x, skip], axis=-1), time)
            if attention:
                x = layers.transform(i, x, context, config.levels("only_cross_attention")[level])
        return x if size is None else Upsample(layers.width, dtype=layers.dtype, name="upsamplers.0")(x, size)


class TimeEmbedding(nn.Module):
    """Two layers on the sinusoidal embedding of the time: [B D] -> [B features]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B features"]:
        x = nn.silu(Dense(self.features, dtype=self.dtype, name="linear_1")(x))
        return Dense(self.features, dtype=self.dtype, name="linear_2")(x)


def embed_time(
    config: UNetConfig,
    t: Num[Array, " B"],
    class_labels: Int[Array, " B"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B T"]:
    """Returns the time embedding [B T] from layers in the calling module; T is four times the finest level's width.

    Raises ValueError if class labels are missing, or given to a network without them.
    """
    if (class_labels is None) != (config.num_class_embeds is None):
        raise ValueError(
            f"class_labels={class_labels}: expected them exactly where num_class_embeds is a number, "
            f"here {config.num_class_embeds}"
        )
    width = config.block_out_channels[0]
    sines = timestep_embedding(t, width, config.flip_sin_to_cos, config.freq_shift).astype(dtype)
    time = TimeEmbedding(4 * width, dtype, name="time_embedding")(sines)
    if class_labels is not None and config.num_class_embeds is not None:
        time = time + nn.Embed(config.num_class_embeds, 4 * width, dtype=dtype, name="class_embedding")(class_labels)
    return time


def descend(
    config: UNetConfig,
    x: Float[Array, "B h w D"],
    time: Float[Array, "B T"],
    context: Float[Array, "B L C"] | None,
    dtype: DTypeLike = jnp.float32,
    remat: bool | str = False,
) -> tuple[Maps, Float[Array, "B _ _ _"]]:
    """Returns (the skip maps of the down half, finest first, including `x` [B h w D]; the middle's map).

    Creates its blocks in the calling module.
    """
    skips, levels = [x], [Layers(config, level, dtype, remat) for level in range(len(config.block_out_channels))]
    for level, layers in enumerate(levels):
        skips += DownBlock(layers, name=f"down_blocks.{level}")(skips[-1], time, context)
    return tuple(skips), MidBlock(levels[-1], name="mid_block")(skips[-1], time, context)


def example(config: UNetConfig) -> dict[str, Any]:
    """Returns the smallest inputs of a UNet, or of a network with its down half."""
    side = 2 ** (len(config.block_out_channels) - 1)
    labels = None if config.num_class_embeds is None else jnp.zeros(1, jnp.int32)
    context = None if config.cross_attention_dim is None else jnp.zeros((1, 1, config.cross_attention_dim))
    z = jnp.zeros((1, side, side, config.in_channels))
    return {"z": z, "t": jnp.zeros(1), "context": context, "class_labels": labels}


class UNet(nn.Module):
    """The UNet: noisy latents, time and text in; the prediction of noise, velocity or image out.

    dtype: type of the computation.  remat: the values that each block keeps for the gradient, see recompute.py.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    remat: bool | str = False

    def example(self) -> dict[str, Any]:
        """Returns the smallest inputs that touch all parameters."""
        return example(self.config)

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "B h w in"],
        t: Num[Array, " B"],
        context: Float[Array, "B L C"] | None = None,
        class_labels: Int[Array, " B"] | None = None,
        residuals: tuple[Maps, Float[Array, "B _ _ D"]] | None = None,
        features_only: bool = False,
        added: Float[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B h w out"] | None, Maps]:
        """Returns (prediction [B h w out], features); the prediction is None if features_only.

        z: [B h w in].  t: [B], 0..999.  context: [B L C], or None if the config has no text.
        class_labels: int [B] if the config has num_class_embeds.
        residuals: (a tuple added to the skip maps, a map added to the middle), from a ControlNet.
        features: the skip maps, finest first, then the middle's map, all before residuals are added.
        added: [B T], added to the time embedding by an enclosing network.
        """
        config, context = self.config, None if context is None else context.astype(self.dtype)
        time = embed_time(config, t, class_labels, self.dtype)
        time = time if added is None else time + added
        x = Conv(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(z)
        skips, x = descend(config, x, time, context, self.dtype, self.remat)
        features = (*skips, x)
        if features_only:
            return None, features
        if residuals is not None:
            skips = tuple(skip + extra for skip, extra in zip(skips, residuals[0], strict=True))
            x = x + residuals[1]
        for i, level in enumerate(reversed(range(len(config.block_out_channels)))):
            count = config.levels("layers_per_block")[level] + 1
            skips, own = skips[:-count], skips[-count:]
            size = skips[-1].shape[1:3] if skips else None
            layers = Layers(config, level, self.dtype, self.remat)
            x = UpBlock(layers, name=f"up_blocks.{i}")(x, own, time, context, size)
        x = nn.silu(GroupNorm(config.norm_num_groups, config.norm_eps, self.dtype, name="conv_norm_out")(x))
        return Conv(config.out_channels, dtype=self.dtype, kernel_init=zeros, name="conv_out")(x), features
