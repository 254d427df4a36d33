"""ControlNet: a copy of the UNet's down half that also sees a picture and adds to the UNet's maps.

B batch, H W pixels, h w latent pixels, L tokens, C text width, D channels.  Submodule names are the keys of diffusers'
ControlNetModel.

    config = ControlNetConfig.from_json(json.load(open("controlnet/config.json")))
    residuals = ControlNet(config).apply({"params": params}, z, t, context, hint)
    prediction, _ = unet.apply({"params": ...}, z, t, context, residuals=residuals)

Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", section 3.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from sdjax.models import sizes
from sdjax.models.layers import Conv, zeros
from sdjax.models.unet import Maps, UNetConfig, descend, embed_time, example

UP = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
# Fields of a UNet's config that a ControlNet's config lacks.
ABSENT = ("sample_size", "out_channels", "up_block_types")


@dataclasses.dataclass(frozen=True)
class ControlNetConfig:
    """The config.json of a ControlNet: the config of the copied UNet, and of the hint's encoder.

    conditioning_embedding_out_channels: widths of the hint's encoder; each one after the first halves the map's size.
    controlnet_conditioning_channel_order: "rgb" or "bgr".
    global_pool_conditions: average the residuals over the picture (the ControlNet "shuffle").
    """

    unet: UNetConfig
    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    def __post_init__(self):
        sizes.check(self)
        if self.controlnet_conditioning_channel_order not in ("rgb", "bgr"):
            order = self.controlnet_conditioning_channel_order
            raise ValueError(f"controlnet_conditioning_channel_order={order!r}: expected rgb or bgr")

    @property
    def layers(self) -> int:
        """The residual blocks, each of several weights."""
        return self.unet.layers

    @classmethod
    def of(cls, unet: UNetConfig, factor: int, **options: Any) -> Self:
        """Returns the config for a UNet's config and an autoencoder with `factor` pixels per latent pixel."""
        widths = cls.conditioning_embedding_out_channels[: factor.bit_length()]
        plain = dataclasses.replace(unet, sample_size=None, in_channels=unet.out_channels)
        return cls(plain, **{"conditioning_embedding_out_channels": widths, **options})

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> Self:
        """Returns the config of a parsed config.json of diffusers' ControlNetModel.

        Raises ValueError naming an option that is unknown or has an unsupported value.
        """
        if options.get("_class_name", "ControlNetModel") != "ControlNetModel":
            raise ValueError(f"_class_name={options['_class_name']!r}: expected 'ControlNetModel'")
        own = {field.name for field in dataclasses.fields(cls)} - {"unet"}
        rest = {name: value for name, value in options.items() if name not in own}
        down = rest.get("down_block_types", UNetConfig.down_block_types)
        rest["up_block_types"] = [UP.get(kind, kind) for kind in reversed(down)]
        values: dict[str, Any] = {name: options[name] for name in own if name in options}
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(UNetConfig.from_json(rest), **values)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the config.json for diffusers' ControlNetModel."""
        unet = {name: value for name, value in self.unet.to_json().items() if name not in ABSENT}
        own = {name: value for name, value in dataclasses.asdict(self).items() if name != "unet"}
        own["conditioning_embedding_out_channels"] = list(self.conditioning_embedding_out_channels)
        return {**unet, **own, "_class_name": "ControlNetModel"}


class ControlNet(nn.Module):
    """Noisy latents, time, text and a picture in; the residuals for the UNet's skip maps and middle out.

    dtype, remat: see UNet.
    """

    config: ControlNetConfig
    dtype: Any = jnp.float32
    remat: bool | str = False

    def example(self) -> dict[str, Any]:
        """Returns the smallest inputs that touch all parameters."""
        inputs = example(self.config.unet)
        side = inputs["z"].shape[1] * 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)
        return {**inputs, "hint": jnp.zeros((1, side, side, self.config.conditioning_channels))}

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "B h w in"],
        t: Num[Array, " B"],
        context: Float[Array, "B L C"],
        hint: Float[Array, "B H W 3"],
        class_labels: Int[Array, " B"] | None = None,
    ) -> tuple[Maps, Float[Array, "B _ _ D"]]:
        """Returns (a residual [B h w D] for each skip map, finest first; one for the middle).

        z: [B h w in].  t: [B].  context: [B L C].  hint: the picture [B H W 3] in [0, 1].
        """
        config = self.config
        unet = config.unet
        time = embed_time(unet, t, class_labels, self.dtype)
        x = Conv(unet.block_out_channels[0], dtype=self.dtype, name="conv_in")(z)
        if config.controlnet_conditioning_channel_order == "bgr":
            hint = hint[..., ::-1]
        x = x + HintEncoder(config, self.dtype, name="controlnet_cond_embedding")(hint)
        skips, middle = descend(unet, x, time, context.astype(self.dtype), self.dtype, self.remat)

        def out(x, name):
            x = Conv(x.shape[-1], 1, dtype=self.dtype, kernel_init=zeros, name=name)(x)
            return x.mean((1, 2), keepdims=True) if config.global_pool_conditions else x

        maps = tuple(out(skip, f"controlnet_down_blocks.{i}") for i, skip in enumerate(skips))
        return maps, out(middle, "controlnet_mid_block")


class HintEncoder(nn.Module):
    """A picture [B H W 3] to a map [B h w D] of the latent's size: convolutions; every second one halves the size."""

    config: ControlNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        widths = self.config.conditioning_embedding_out_channels
        x = nn.silu(Conv(widths[0], dtype=self.dtype, name="conv_in")(x))
        for i, (width, wider) in enumerate(zip(widths, widths[1:], strict=False)):
            x = nn.silu(Conv(width, dtype=self.dtype, name=f"blocks.{2 * i}")(x))
            x = nn.silu(Conv(wider, strides=2, padding=1, dtype=self.dtype, name=f"blocks.{2 * i + 1}")(x))
        return Conv(self.config.unet.block_out_channels[0], dtype=self.dtype, kernel_init=zeros, name="conv_out")(x)
