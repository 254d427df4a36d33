"""The KL autoencoder between pictures and latents.  Submodules are named as in diffusers' AutoencoderKL.

Shapes: B batch, H W pixels, h w latent pixels (H / f, W / f with f = 2^(blocks - 1)), c latent channels, D channels.

    vae = AutoencoderKL(VaeConfig.from_json(json.load(file)))
    mean, logvar = vae.apply(params, pixels, method="encode")  # [B h w c] each
    pixels = vae.apply(params, mean, method="decode")          # [B H W 3]
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from sdjax.models.layers import Conv, Dense, Downsample, GroupNorm, ResnetBlock, Upsample, attend

EPS = 1e-6  # of every GroupNorm; CompVis latent-diffusion, modules/diffusionmodules/model.py, Normalize
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
# Options with one supported value, given here; they stand in files and change the numbers.
FIXED = {"shift_factor": None, "latents_mean": None, "latents_std": None}


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """The vae/config.json of a diffusers folder; defaults are those of diffusers' AutoencoderKL.

    scaling_factor: the UNet sees latents times this.  force_upcast: the folder asks for float32 here in any case.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_json(cls, values):
        """Returns the config of a parsed config.json; keys that begin with "_" are ignored.

        Raises ValueError for another class of model and for options that are unknown or not supported.
        """
        values = {"_class_name": "AutoencoderKL", **values}
        if values["_class_name"] != "AutoencoderKL":
            raise ValueError(f"_class_name={values['_class_name']!r}: expected 'AutoencoderKL'")
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        blocks = len(values.get("block_out_channels", (64,)))
        _only(values.pop("act_fn", "silu"), ("silu", "swish"), "act_fn")  # two names of one function
        _only(list(values.pop("down_block_types", [DOWN] * blocks)), ([DOWN] * blocks,), "down_block_types")
        _only(list(values.pop("up_block_types", [UP] * blocks)), ([UP] * blocks,), "up_block_types")
        for name, value in FIXED.items():
            _only(values.pop(name, value), (value,), name)
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{unknown[0]}={values[unknown[0]]!r}: unknown option of AutoencoderKL")
        if "block_out_channels" in values:
            values["block_out_channels"] = tuple(values["block_out_channels"])
        return cls(**values)

    def __post_init__(self):
        wrong = [width for width in self.block_out_channels if width % self.norm_num_groups]
        if wrong or not self.block_out_channels:
            widths, groups = self.block_out_channels, self.norm_num_groups
            raise ValueError(f"block_out_channels={widths}: expected multiples of norm_num_groups={groups}")

    def to_json(self):
        """Returns the dict for config.json that diffusers' AutoencoderKL reads."""
        blocks = len(self.block_out_channels)
        fixed = {"_class_name": "AutoencoderKL", "act_fn": "silu", **FIXED}
        types = {"down_block_types": [DOWN] * blocks, "up_block_types": [UP] * blocks}
        return {**fixed, **types, **dataclasses.asdict(self), "block_out_channels": list(self.block_out_channels)}


def _only(value, accepted, name):
    if value not in accepted:
        raise ValueError(f"{name}={value!r}: expected {' or '.join(repr(one) for one in accepted)}")


class AutoencoderKL(nn.Module):
    """Encoder to a Gaussian over latents, and decoder.  remat: keep only the residual blocks' inputs for the gradient.

    Source: Rombach et al. 2022, 3.1 and appendix G.
    """

    config: VaeConfig
    dtype: object = jnp.float32
    remat: bool = False

    def setup(self):
        config = self.config
        self.encoder = _Encoder(config, self.dtype, self.remat)
        self.decoder = _Decoder(config, self.dtype, self.remat)
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * config.latent_channels, 1, dtype=self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(config.latent_channels, 1, dtype=self.dtype)

    def encode(self, x, only=None):
        """Returns (mean, logvar) of the latents, float32 [B h w c] each, logvar in [-30, 20]; not scaled.

        x: pixels [B H W 3] in [-1, 1].
        only: "fine" ends before the middle, with the map [B h w D] from which "coarse" goes on.
        """
        moments = self.encoder(x, only)
        if only == "fine":
            return moments
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)  # limits: CompVis latent-diffusion, DiagonalGaussianDistribution

    def decode(self, z, only=None):
        """Returns the pixels, float32 [B H W 3], about [-1, 1] but not clipped, of latents that are not scaled.

        only: "coarse" ends behind the middle, with the map [B h w D] from which "fine" goes on.
        """
        if self.config.use_post_quant_conv and only != "fine":
            z = self.post_quant_conv(z)
        return self.decoder(z, only).astype(jnp.float32)

    def __call__(self, x, key):
        """Returns (decode(z), mean, logvar) with z = mean + exp(logvar / 2) noise."""
        mean, logvar = self.encode(x)
        noise = jax.random.normal(key, mean.shape)
        return self.decode(mean + jnp.exp(logvar / 2) * noise), mean, logvar


class _Encoder(nn.Module):
    config: VaeConfig
    dtype: object
    remat: bool

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
        return _out(x, 2 * config.latent_channels, config, self.dtype)


class _Decoder(nn.Module):
    config: VaeConfig
    dtype: object
    remat: bool

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
    dtype: object
    remat: bool

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
    dtype: object
    remat: bool

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.layers_per_block + 1):
            x = _resnet(self.width, self.config, self.dtype, self.remat, f"resnets.{i}")(x)
        if self.upsample:
            x = Upsample(self.width, self.dtype, name="upsamplers.0")(x)
        return x


class _MidBlock(nn.Module):
    config: VaeConfig
    dtype: object
    remat: bool

    @nn.compact
    def __call__(self, x):
        width = self.config.block_out_channels[-1]
        x = _resnet(width, self.config, self.dtype, self.remat, "resnets.0")(x)
        if self.config.mid_block_add_attention:
            x = _Attention(self.config.norm_num_groups, self.dtype, name="attentions.0")(x)
        return _resnet(width, self.config, self.dtype, self.remat, "resnets.1")(x)


class _Attention(nn.Module):
    """Attention of one head over all positions, added to its input."""

    groups: int
    dtype: object

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        rows = GroupNorm(self.groups, EPS, self.dtype, name="group_norm")(x).reshape(len(x), -1, width)  # [B N D]
        q, k, v = (Dense(width, dtype=self.dtype, name=f"to_{name}")(rows) for name in "qkv")
        rows = attend(q, k, v, heads=1, upcast=True)
        return x + Dense(width, dtype=self.dtype, name="to_out.0")(rows).reshape(x.shape)


def _resnet(width, config, dtype, remat, name):
    block = nn.remat(ResnetBlock) if remat else ResnetBlock
    return block(width, config.norm_num_groups, EPS, dtype=dtype, name=name)


def _out(x, features, config, dtype):
    x = nn.silu(GroupNorm(config.norm_num_groups, EPS, dtype, name="conv_norm_out")(x))
    return Conv(features, dtype=dtype, name="conv_out")(x)
