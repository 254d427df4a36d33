"""The autoencoder between pictures and latents.  Submodules are named as in diffusers' AutoencoderKL and VQModel.

Shapes: B batch, H W pixels, h w latent pixels (H / f, W / f with f = 2^(blocks - 1)), c latent channels, D channels.

    vae = AutoencoderKL(VaeConfig.from_json(json.load(file)))
    mean, logvar = vae.apply(params, pixels, method="encode")  # [B h w c] each
    pixels = vae.apply(params, mean, method="decode")          # [B H W 3]
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from sdjax.models import sizes
from sdjax.models.layers import Conv, Downsample, GroupNorm, MapAttention, ResnetBlock, Upsample
from sdjax.models.recompute import recomputed

EPS = 1e-6  # epsilon of every GroupNorm; CompVis latent-diffusion, modules/diffusionmodules/model.py, Normalize
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
# Options in files with one supported value, given here; other values would change the results.
FIXED = {"shift_factor": None, "latents_mean": None, "latents_std": None}
FIXED_VQ = {"norm_type": "group", "lookup_from_codebook": False}
NO_VARIANCE = -30.0  # log-variance that stands for none, and the lowest that encode returns


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """The vae/config.json of a diffusers folder, with the defaults of diffusers' AutoencoderKL.

    scaling_factor: the UNet sees latents times this.  force_upcast: compute in float32 if the other parts use float16,
    whose range this autoencoder exceeds.
    num_vq_embeddings: entries of the codebook of a VQModel, whose latents are not scaled; None for a KL autoencoder.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    num_vq_embeddings: int | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Returns the config of a parsed config.json; keys that begin with "_" are ignored.

        Raises ValueError for another class of model and for options that are unknown or not supported.
        """
        kind = values.get("_class_name", "AutoencoderKL")
        _only(kind, ("AutoencoderKL", "VQModel"), "_class_name")
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        if kind == "VQModel":
            values = _quantized(values)
        blocks = len(values.get("block_out_channels", (64,)))
        _only(values.pop("act_fn", "silu"), ("silu", "swish"), "act_fn")  # two names for one function
        _only(list(values.pop("down_block_types", [DOWN] * blocks)), ([DOWN] * blocks,), "down_block_types")
        _only(list(values.pop("up_block_types", [UP] * blocks)), ([UP] * blocks,), "up_block_types")
        for name, value in FIXED.items():
            _only(values.pop(name, value), (value,), name)
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{unknown[0]}={values[unknown[0]]!r}: unknown option of {kind}")
        if "block_out_channels" in values:
            values["block_out_channels"] = tuple(values["block_out_channels"])
        return cls(**values)

    def __post_init__(self):
        sizes.check(self, most={"layers_per_block": 64, "num_vq_embeddings": 1 << 20})
        wrong = [width for width in self.block_out_channels if width % self.norm_num_groups]
        if wrong:
            widths, groups = self.block_out_channels, self.norm_num_groups
            raise ValueError(f"block_out_channels={widths}: expected multiples of norm_num_groups={groups}")

    @property
    def layers(self) -> int:
        """The number of residual blocks in the encoder, each with several weights."""
        return self.layers_per_block * len(self.block_out_channels)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the config.json for diffusers' AutoencoderKL or VQModel."""
        blocks, quantized = len(self.block_out_channels), self.num_vq_embeddings is not None
        fixed = {"_class_name": "VQModel" if quantized else "AutoencoderKL", "act_fn": "silu"}
        fixed |= FIXED_VQ if quantized else FIXED
        types = {"down_block_types": [DOWN] * blocks, "up_block_types": [UP] * blocks}
        own = dataclasses.asdict(self)
        for name in ("use_quant_conv", "use_post_quant_conv") if quantized else ("num_vq_embeddings",):
            del own[name]
        return {**fixed, **types, **own, "block_out_channels": list(self.block_out_channels)}


def _quantized(values):
    """Returns a VQModel's options as VaeConfig's.

    Ignores the scaling factor in the file: neither the original code nor diffusers' pipeline scales these latents.
    """
    values = {"latent_channels": 3, "num_vq_embeddings": 256, "force_upcast": False, **values, "scaling_factor": 1.0}
    _only(values.pop("vq_embed_dim", None), (None, values["latent_channels"]), "vq_embed_dim")
    for name, value in FIXED_VQ.items():
        _only(values.pop(name, value), (value,), name)
    return values


def _only(value, accepted, name):
    if value not in accepted:
        raise ValueError(f"{name}={value!r}: expected {' or '.join(repr(one) for one in accepted)}")


class AutoencoderKL(nn.Module):
    """Encoder to a Gaussian over latents, and decoder.

    remat: the values that a residual block keeps for the gradient, see recompute.py.
    dtype: float16 computes in float32 if the config has force_upcast, as in diffusers' pipelines for Stable Diffusion
    XL; for other models this is our choice.
    With a codebook (num_vq_embeddings), the Gaussian has no variance, and the decoder uses the nearest entries.
    Source: Rombach et al. 2022, 3.1 and appendix G.
    """

    config: VaeConfig
    dtype: Any = jnp.float32
    remat: bool | str = False

    def setup(self) -> None:
        config, quantized = self.config, self.config.num_vq_embeddings is not None
        upcast = config.force_upcast and jnp.dtype(self.dtype) == jnp.float16
        dtype = jnp.float32 if upcast else self.dtype
        made = config.latent_channels if quantized else 2 * config.latent_channels
        self.encoder = _Encoder(config, made, dtype, self.remat)
        self.decoder = _Decoder(config, dtype, self.remat)
        if config.use_quant_conv:
            self.quant_conv = Conv(made, 1, dtype=dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(config.latent_channels, 1, dtype=dtype)
        if config.num_vq_embeddings is not None:
            self.quantize = Codebook(config.num_vq_embeddings, config.latent_channels)

    def example(self) -> dict[str, Any]:
        """Returns the smallest inputs that touch all parameters."""
        side = 2 ** (len(self.config.block_out_channels) - 1)
        return {"x": jnp.zeros((1, side, side, self.config.in_channels)), "key": jax.random.key(0)}

    def encode(
        self, x: Float[Array, "B H W 3"] | Float[Array, "B h w D"], only: str | None = None
    ) -> tuple[Float32[Array, "B h w c"], Float32[Array, "B h w c"]] | Float[Array, "B h w D"]:
        """Returns (mean, logvar) of the latents, float32 [B h w c] each, logvar in [-30, 20]; not scaled.

        x: pixels [B H W 3] in [-1, 1].
        only: "fine" returns the map [B h w D] before the middle block; "coarse" takes it as x and computes the rest.
        """
        moments = self.encoder(x, only)
        if only == "fine":
            return moments
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        moments = moments.astype(jnp.float32)
        if self.config.num_vq_embeddings is not None:
            return moments, jnp.full_like(moments, NO_VARIANCE)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, NO_VARIANCE, 20)  # CompVis latent-diffusion, DiagonalGaussianDistribution

    def decode(
        self, z: Float[Array, "B h w c"] | Float[Array, "B h w D"], only: str | None = None
    ) -> Float32[Array, "B H W 3"] | Float32[Array, "B h w D"]:
        """Returns the pixels, float32 [B H W 3], about [-1, 1] but not clipped, of unscaled latents.

        only: "coarse" returns the map [B h w D] after the middle block; "fine" takes it as z and computes the rest.
        """
        if self.config.num_vq_embeddings is not None and only != "fine":
            z = self.quantize(z)
        if self.config.use_post_quant_conv and only != "fine":
            z = self.post_quant_conv(z)
        return self.decoder(z, only).astype(jnp.float32)

    def __call__(
        self, x: Float[Array, "B H W 3"], key: Key[Array, ""]
    ) -> tuple[Float32[Array, "B H W 3"], Float32[Array, "B h w c"], Float32[Array, "B h w c"]]:
        """Returns (decode(z), mean, logvar) with z = mean + exp(logvar / 2) noise."""
        mean, logvar = self.encode(x)
        noise = jax.random.normal(key, mean.shape)
        return self.decode(mean + jnp.exp(logvar / 2) * noise), mean, logvar


class Codebook(nn.Module):
    """The nearest of `entries` vectors for each vector of z [B h w c]; the gradient passes straight through to z.

    Source: van den Oord et al. 2017, equations 1 and 2.
    """

    entries: int
    channels: int

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float32[Array, "B h w c"]:
        z = z.astype(jnp.float32)
        table = nn.Embed(self.entries, self.channels, name="embedding")
        codes = table(jnp.arange(self.entries))

        def nearest(row):  # [w c] -> [w]; by rows, since all distances at once would take gigabytes
            return jnp.square(row[:, None] - codes[None]).sum(-1).argmin(-1)

        index = jax.lax.map(nearest, z.reshape(-1, *z.shape[2:])).reshape(z.shape[:-1])
        return z + jax.lax.stop_gradient(codes[index] - z)


class _Encoder(nn.Module):
    config: VaeConfig
    features: int
    dtype: Any
    remat: bool | str

    @nn.compact
    def __call__(self, x, only=None):
        config, widths = self.config, self.config.block_out_channels
        if only != "coarse":
            x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
            for i, width in enumerate(widths):
                last = i == len(widths) - 1
                block = _DownBlock(config, width, not last, self.dtype, self.remat, name=f"down_blocks.{i}")
                x = block(x)
        if only == "fine":
            return x
        x = _MidBlock(config, self.dtype, self.remat, name="mid_block")(x)
        return _out(x, self.features, config, self.dtype)


class _Decoder(nn.Module):
    config: VaeConfig
    dtype: Any
    remat: bool | str

    @nn.compact
    def __call__(self, z, only=None):
        config, widths = self.config, self.config.block_out_channels[::-1]
        x = z
        if only != "fine":
            x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
            x = _MidBlock(config, self.dtype, self.remat, name="mid_block")(x)
        if only == "coarse":
            return x
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = _UpBlock(config, width, not last, self.dtype, self.remat, name=f"up_blocks.{i}")(x)
        return _out(x, config.out_channels, config, self.dtype)


class _DownBlock(nn.Module):
    config: VaeConfig
    width: int
    downsample: bool
    dtype: Any
    remat: bool | str

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.layers_per_block):
            x = _resnet(self.width, self.config, self.dtype, self.remat, f"resnets.{i}")(x)
        if self.downsample:
            x = Downsample(self.width, ((0, 1), (0, 1)), self.dtype, name="downsamplers.0")(x)
        return x


class _UpBlock(nn.Module):
    config: VaeConfig
    width: int
    upsample: bool
    dtype: Any
    remat: bool | str

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.layers_per_block + 1):
            x = _resnet(self.width, self.config, self.dtype, self.remat, f"resnets.{i}")(x)
        if self.upsample:
            x = Upsample(self.width, self.dtype, name="upsamplers.0")(x)
        return x


class _MidBlock(nn.Module):
    config: VaeConfig
    dtype: Any
    remat: bool | str

    @nn.compact
    def __call__(self, x):
        width = self.config.block_out_channels[-1]
        x = _resnet(width, self.config, self.dtype, self.remat, "resnets.0")(x)
        if self.config.mid_block_add_attention:
            x = MapAttention(1, self.config.norm_num_groups, EPS, self.dtype, name="attentions.0")(x)
        return _resnet(width, self.config, self.dtype, self.remat, "resnets.1")(x)


def _resnet(width, config, dtype, remat, name):
    block = recomputed(ResnetBlock, remat)
    return block(width, config.norm_num_groups, EPS, dtype=dtype, name=name)


def _out(x, features, config, dtype):
    x = nn.silu(GroupNorm(config.norm_num_groups, EPS, dtype, name="conv_norm_out")(x))
    return Conv(features, dtype=dtype, name="conv_out")(x)
