"""Critics of a reconstruction: a patch discriminator, LPIPS, and a distance of features from our own image encoder.

Shapes: B batch, H W pixels in [-1, 1], N positions of a map, D channels.

    scores = PatchDiscriminator().apply({"params": critic}, pixels)  # [B h w 1], real > 0 > generated
    error = Lpips().apply({"params": weights}, pixels, made)         # [B]
    error = lpips(weights, pixels, made)                             # the same
    error = feature_distance(states(pixels), states(made))           # [B], states = ImageEncoder.states
"""

import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sdjax.models.layers import Conv, GroupNorm
from sdjax.trees import Tree

SLOPE = 0.2  # of the leaky ReLU; Isola et al. 2017, appendix 6.1
MOST = 8  # most channels of a layer, as a multiple of the first's; Isola et al. 2017, appendix 6.1.2
CONVS = (
    2,
    2,
    3,
    3,
    3,
)  # convolutions per stage of VGG16, with a pooling after each stage; Simonyan and Zisserman 2015, table 1, D
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's in [-1, 1]; richzhang/PerceptualSimilarity
EPS = 1e-10  # added to norms; the same repository


class PatchDiscriminator(nn.Module):
    """Scores how real each patch is: [B H W 3] -> scores [B h w 1], h = H / 2^layers - 2.

    channels: of the first layer.  layers: convolutions of stride 2; a score sees 70 pixels with 3, 34 with 2.
    Group normalisation replaces batch normalisation, so a score depends only on its own picture.
    Source: Isola et al. 2017, with the names of CompVis taming-transformers, NLayerDiscriminator.
    """

    channels: int = 64
    layers: int = 3
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w 1"]:
        """Returns the scores.  Raises ValueError for pictures that are too small for a score."""
        if min(pixels.shape[1:3]) >> self.layers < 3:
            raise ValueError(
                f"picture of {pixels.shape[1:3]}: {self.layers} layers need {3 << self.layers} pixels a side"
            )
        x = nn.leaky_relu(self.conv(self.channels, 2, 0, use_bias=True)(pixels), SLOPE)
        for i in range(1, self.layers + 1):
            width, place = self.channels * min(2**i, MOST), 3 * i - 1
            x = self.conv(width, 1 if i == self.layers else 2, place)(x)
            norm = GroupNorm(math.gcd(self.groups, width), dtype=self.dtype, name=f"main.{place + 1}")
            x = nn.leaky_relu(norm(x), SLOPE)
        return self.conv(1, 1, 3 * self.layers + 2, use_bias=True)(x)

    def conv(self, features: int, strides: int, place: int, use_bias: bool = False) -> Conv:
        """Returns the 4x4 convolution at a place of the sequence, initialised from N(0, 0.02) as in taming."""
        start = nn.initializers.normal(0.02)
        return Conv(features, 4, strides, 1, use_bias, self.dtype, start, name=f"main.{place}")


class Lpips(nn.Module):
    """The learned perceptual distance [B] of two pictures [B H W 3] in [-1, 1]; the caller provides the weights.

    It is the sum over stages of the mean over positions of lin(|f(x) - f(y)|^2), where f are the channel-normalised
    features of VGG16's relu1_2, 2_2, 3_3, 4_3 and 5_3.  Names are torchvision's (features.N) and lpips' (linN.model.1).
    Source: Zhang et al. 2018, equation 1.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], y: Float[Array, "B H W 3"]) -> Float32[Array, " B"]:
        """Returns the distances.  Raises ValueError for sides under 16 pixels, which are too small for the poolings."""
        if min(x.shape[1:3]) < 16:
            raise ValueError(f"picture of {x.shape[1:3]}: LPIPS needs 16 pixels a side")
        shift, scale = (jnp.array(values, self.dtype)[None, None, None] for values in (SHIFT, SCALE))
        maps = (jnp.concatenate([x, y]) - shift) / scale
        total, place = jnp.zeros(len(x)), 0
        for stage, (width, convs) in enumerate(zip(self.widths, CONVS, strict=True)):
            for _ in range(convs):
                maps = nn.relu(Conv(width, dtype=self.dtype, name=f"features.{place}")(maps))
                place += 2  # the ReLU also has a number
            lin = Conv(1, 1, use_bias=False, dtype=jnp.float32, name=f"lin{stage}.model.1")
            ours, theirs = jnp.split(_unit(maps), 2)
            total = total + lin(jnp.square(ours - theirs)).mean((1, 2, 3))
            maps, place = nn.max_pool(maps, (2, 2), (2, 2)), place + 1
        return total


def lpips(weights: Tree, x: Float[Array, "B H W 3"], y: Float[Array, "B H W 3"]) -> Float32[Array, " B"]:
    """Returns LPIPS [B] of pictures [B H W 3] in [-1, 1]; the widths follow from the weights.

    Raises ValueError for sides under 16 pixels.
    """
    widths = tuple(weights[f"lin{stage}.model.1"]["kernel"].shape[2] for stage in range(len(CONVS)))
    return Lpips(widths).apply({"params": weights}, x, y)  # pyright: ignore[reportReturnType]  # nothing is mutable


def feature_distance(
    ours: Iterable[Float[Array, "B N D"]], theirs: Iterable[Float[Array, "B N D"]]
) -> Float32[Array, " B"]:
    """Returns the distance [B] of pictures in a transformer: the mean over layers and patches of |f(x) - f(y)|^2.

    ours, theirs: tuples of hidden states [B N D], class token first (ImageEncoder.states).  f is scaled to length 1, so
    each term is in [0, 4].  This is LPIPS' formula with equal weights, for models without VGG's weights.
    """
    layers = [jnp.square(_unit(x[:, 1:]) - _unit(y[:, 1:])).sum(-1).mean(1) for x, y in zip(ours, theirs, strict=True)]
    return jnp.stack(layers).mean(0)


def _unit(x):
    """Returns x / (|x| + EPS) along the last axis, float32; the gradient at zero is finite."""
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return x / (length + EPS)
