"""The layers that all networks share: convolution, norms, attention, residual block, resampling, time embedding.

Layout is channels last.  B batch, h w positions on a map, N M positions in a row, D channels.  Parameters are named as
Linen does (kernel, scale, bias); submodules carry diffusers' names.  Every layer computes in its `dtype` and casts the
parameters it is given; norms take their statistics in float32.

    x = Conv(64, dtype=dtype, name="conv_in")(x)
    x = ResnetBlock(64, groups=16, dtype=dtype, name="resnets.0")(x, time)
    y = attend(q, k, v, heads=8)
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

zeros = nn.initializers.zeros_init()


def precision(dtype):
    """Returns the precision of products in a compute type: "highest" for float32 (GPUs and TPUs round it otherwise)."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def Dense(features, use_bias=True, dtype=jnp.float32, name=None, **options):
    """Returns Linen's Dense (kernel [in out], bias) that multiplies in `dtype` and, for float32, exactly."""
    return nn.Dense(features, use_bias, dtype=dtype, precision=precision(dtype), name=name, **options)


class Conv(nn.Module):
    """A 2-D convolution [B h w in] -> [B h' w' features]; parameters kernel (height, width, in, features) and bias.

    padding: None keeps the size at stride 1 (kernel_size // 2 on every side); an int for all sides; or pairs
    ((top, bottom), (left, right)).
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: object = None
    use_bias: bool = True
    dtype: object = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        size = self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (size, size, x.shape[-1], self.features), jnp.float32)
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.pads())
        if self.use_bias:
            y = y + self.param("bias", zeros, (self.features,), jnp.float32).astype(self.dtype)[None, None, None]
        return y

    def pads(self):
        """Returns the padding as pairs for height and width."""
        padding = self.kernel_size // 2 if self.padding is None else self.padding
        return ((padding, padding), (padding, padding)) if isinstance(padding, int) else tuple(map(tuple, padding))


def convolve(x, kernel, strides=1, pads=((1, 1), (1, 1))):
    """Returns the convolution of x [B h w in] with kernel [a b in out], without bias.

    On CPUs a 3x3 convolution that keeps the size has a gradient of its own, see _kernel_gradient.
    """
    plain = kernel.shape[:2] == (3, 3) and strides == 1 and tuple(pads) == ((1, 1), (1, 1))
    if plain and jax.default_backend() == "cpu" and min(*x.shape[1:3], *kernel.shape[2:]) >= 8:
        return _convolve_3x3(x, kernel)
    return _convolve(x, kernel, strides, pads)


def _convolve(x, kernel, strides=1, pads=((1, 1), (1, 1))):
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision(x.dtype)
    )


@jax.custom_vjp
def _convolve_3x3(x, kernel):
    return _convolve(x, kernel)


def _convolve_3x3_backward(saved, dy):
    x, kernel = saved
    return _convolve(dy, jnp.flip(kernel, (0, 1)).swapaxes(2, 3)), _kernel_gradient(x, dy)


_convolve_3x3.defvjp(lambda x, kernel: (_convolve(x, kernel), (x, kernel)), _convolve_3x3_backward)


def _kernel_gradient(x, dy):
    """Returns the gradient [3 3 in out] of a 3x3 kernel, picture by picture as a product with the picture's 3x3 patches.

    XLA:CPU takes the output's size as the window of a convolution for it, which is two to three times slower.
    """
    (B, h, w, D), out = x.shape, dy.shape[-1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def add(total, pair):
        picture, gradient = pair
        patches = jnp.concatenate([picture[a : a + h, b : b + w] for a in range(3) for b in range(3)], -1)  # [h w 9D]
        return total + gradient.reshape(h * w, out).T @ patches.reshape(h * w, 9 * D), None

    total, _ = lax.scan(add, jnp.zeros((out, 9 * D), x.dtype), (padded, dy))
    return total.T.reshape(3, 3, D, out)


class GroupNorm(nn.Module):
    """Group normalisation of [B ... D] over the positions and the channels of each group; parameters scale and bias.

    Source: Wu and He 2018.
    """

    groups: int = 32
    eps: float = 1e-5
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (width,), jnp.float32).astype(jnp.float32)
        bias = self.param("bias", zeros, (width,), jnp.float32).astype(jnp.float32)
        space = tuple(range(1, x.ndim - 1))
        rows = x.astype(jnp.float32)

        def mean(values):  # [B ... D] -> [B 1 .. D], the mean of each channel's group
            channel = values.mean(space)  # [B D]
            group = channel.reshape(len(x), self.groups, -1)
            group = jnp.broadcast_to(group.mean(-1, keepdims=True), group.shape)
            return group.reshape(len(x), *(1,) * len(space), width)

        centre = mean(rows)
        factor = lax.rsqrt(mean(jnp.square(rows - centre)) + self.eps) * scale.reshape((1,) * (x.ndim - 1) + (width,))
        offset = bias.reshape((1,) * (x.ndim - 1) + (width,)) - centre * factor
        return (rows * factor + offset).astype(self.dtype)


class LayerNorm(nn.Module):
    """Normalisation of the last axis with the exact variance; parameters scale and bias."""

    eps: float = 1e-5
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones_init(), shape[-1:], jnp.float32).astype(jnp.float32)
        bias = self.param("bias", zeros, shape[-1:], jnp.float32).astype(jnp.float32)
        rows = x.astype(jnp.float32)
        rows = rows - rows.mean(-1, keepdims=True)
        rows = rows * lax.rsqrt(jnp.square(rows).mean(-1, keepdims=True) + self.eps)
        return (rows * scale.reshape(shape) + bias.reshape(shape)).astype(self.dtype)


def attend(q, k, v, heads, mask=None, upcast=False):
    """Returns multi-head attention softmax(q k^T / sqrt(D / heads)) v, [B N D].

    q: [B N D].  k, v: [B M D].  mask: boolean, broadcastable to [B heads N M]; True where a query may look.
    upcast: compute scores and softmax in float32 whatever the type of q.
    Source: Vaswani et al. 2017, equation 1.
    """
    dtype = q.dtype
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))  # [B N heads d]
    if upcast:
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k, precision=precision(q.dtype))
    if mask is not None:
        scores = jnp.where(mask.reshape((1,) * (4 - mask.ndim) + mask.shape), scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(dtype)
    out = jnp.einsum("bhnm,bmhd->bnhd", weights, v, precision=precision(dtype))
    return out.reshape(*out.shape[:2], -1)


def timestep_embedding(t, width, flip_sin_to_cos=True, shift=0):
    """Returns sines and cosines of t [B] at width / 2 frequencies 10000^(-i / (width / 2 - shift)), float32 [B width].

    Cosines come first where flip_sin_to_cos.  An odd width ends in a zero.
    Source: Vaswani et al. 2017, 3.5; options as in diffusers' Timesteps.
    """
    half = width // 2
    rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * rates[None]
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


class ResnetBlock(nn.Module):
    """A residual block [B h w in] -> [B h w features]: norm, silu, conv, time added, norm, silu, conv, plus its input.

    time: embedding of the time [B T], or None where the network has no time (no time_emb_proj then).
    zero: start as the identity, with zeros in the last convolution.
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    zero: bool = False
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, time=None):
        last = zeros if self.zero else nn.initializers.lecun_normal()
        y = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x))
        y = Conv(self.features, dtype=self.dtype, name="conv1")(y)
        if time is not None:
            y = y + Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))[:, None, None]
        y = nn.silu(GroupNorm(self.groups, self.eps, self.dtype, name="norm2")(y))
        y = Conv(self.features, dtype=self.dtype, kernel_init=last, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + y


class Downsample(nn.Module):
    """Half the size by a 3x3 convolution of stride 2.  padding: 1 in UNets; ((0, 1), (0, 1)) in VAE encoders."""

    features: int
    padding: object = 1
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        return Conv(self.features, strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Twice the size, or `size` (h, w) where given, by repeating the nearest position; then a 3x3 convolution."""

    features: int
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, size=None):
        x = repeat(x, size or (2 * x.shape[1], 2 * x.shape[2]))
        return Conv(self.features, dtype=self.dtype, name="conv")(x)


def repeat(x, size):
    """Returns x [B h w D] resized to `size` by the nearest position, index floor(i * h / size)."""
    for axis, length in zip((1, 2), size, strict=True):
        if length != x.shape[axis]:
            factor, rest = divmod(length, x.shape[axis])
            take = jnp.arange(length) * x.shape[axis] // length
            x = x.take(take, axis) if rest else x.repeat(factor, axis)
    return x
