"""The layers that all networks share: convolution, norms, attention, residual block, resampling, time embedding.

Layout is channels last.  B batch, h w positions on a map, N M positions in a row, D channels.  Parameters have Linen's
names (kernel, scale, bias), submodules diffusers' names.  Every layer computes in its `dtype` and casts its parameters;
norms compute their statistics in float32.  The computation of a layer is a compiled function of arrays, so layers of
one shape are traced and lowered once.

    x = Conv(64, dtype=dtype, name="conv_in")(x)
    x = ResnetBlock(64, groups=16, dtype=dtype, name="resnets.0")(x, time)
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Num

from sdjax.models.kernels.attention import attend
from sdjax.models.kernels.convolution import convolve, convolve_wide
from sdjax.models.kernels.convolution_plain import Pads
from sdjax.models.kernels.divided import by_rows
from sdjax.models.kernels.precision import precision, summed
from sdjax.models.recompute import product

zeros = nn.initializers.zeros_init()


def parameter(module: nn.Module, name: str, start: Callable, shape: tuple[int, ...]) -> Array:
    """Returns a layer's parameter, as it is given, or float32 from its initialiser `start`.

    Linen's `param` traces the initialiser to compare the shape of a given parameter; that took half of the time to
    trace sampling.
    Raises ValueError for a given parameter of another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, start, shape, jnp.float32)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise ValueError(f"{'.'.join(module.path)}.{name}: shape {value.shape}, expected {shape}")
    return value


class Dense(nn.Module):
    """A linear layer [... in] -> [... features]; parameters kernel [in features] and bias.

    Float32 products are exact.  wide: return the float32 sums before they are rounded to `dtype`, for a hook that adds
    something small.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*space in"], wide: bool = False) -> Float[Array, "*space features"]:
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        y = multiply(x, kernel, wide, jnp.dtype(self.dtype))
        return product(add(y, parameter(self, "bias", zeros, (self.features,))) if self.use_bias else y)


@functools.partial(jax.jit, static_argnums=(2, 3))
def multiply(
    x: Float[Array, "*space in"], kernel: Float[Array, "in out"], wide: bool, dtype: Any
) -> Float[Array, "*space out"]:
    """Returns x times a kernel, both cast to a type; the result has that type or, if wide, float32."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    if not wide:
        return lax.dot_general(x, kernel, dims, precision=precision(x.dtype))
    return lax.dot_general(x, kernel, dims, precision=summed(x.dtype), preferred_element_type=jnp.float32)


@jax.jit
def add(y: Float[Array, "*space D"], bias: Float[Array, " D"]) -> Float[Array, "*space D"]:
    """Returns y with a bias of its type added to its last axis."""
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Conv(nn.Module):
    """A 2-D convolution [B h w in] -> [B h' w' features]; parameters kernel (height, width, in, features) and bias.

    padding: None keeps the size at stride 1 (kernel_size // 2 on every side); an int for all sides; or pairs
    ((top, bottom), (left, right)).
    wide: see Dense.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: int | Pads | None = None
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "B h w in"], wide: bool = False) -> Float[Array, "B _ _ features"]:
        size = self.kernel_size
        kernel = parameter(self, "kernel", self.kernel_init, (size, size, x.shape[-1], self.features))
        way = convolve_wide if wide else convolve
        y = by_rows(way(by_rows(x.astype(self.dtype)), kernel.astype(self.dtype), self.strides, self.pads()))
        return product(add(y, parameter(self, "bias", zeros, (self.features,))) if self.use_bias else y)

    def pads(self) -> Pads:
        """Returns the padding with zeros as pairs for height and width; a method, so that hooks can wrap it."""
        return self.sides()

    def sides(self) -> Pads:
        """Returns the declared padding as pairs for height and width."""
        padding = self.kernel_size // 2 if self.padding is None else self.padding
        if isinstance(padding, int):
            return (padding, padding), (padding, padding)
        (top, bottom), (left, right) = padding
        return (top, bottom), (left, right)


class GroupNorm(nn.Module):
    """Group normalisation of [B ... D] over the positions and the channels of each group; parameters scale and bias.

    moments: (mean, variance) [B groups] to use instead of x's own, if x is a part of a larger array.
    Source: Wu and He 2018.
    """

    groups: int = 32
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B *space D"],
        moments: tuple[Float[Array, "B groups"], Float[Array, "B groups"]] | None = None,
    ) -> Float[Array, "B *space D"]:
        width = x.shape[-1]
        scale = parameter(self, "scale", nn.initializers.ones_init(), (width,))
        bias = parameter(self, "bias", zeros, (width,))
        if moments is None:
            return _grouped(x, scale, bias, self.groups, self.eps, jnp.dtype(self.dtype))
        scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
        return _normalise(x, scale, bias, *moments, self.eps).astype(self.dtype)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _grouped(x, scale, bias, groups, eps, dtype):
    """Returns group_norm with parameters of any type, as `dtype`."""
    y: Any = group_norm(x, scale.astype(jnp.float32), bias.astype(jnp.float32), groups, eps)  # Any: partial hides it
    return y.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(
    x: Float[Array, "B *space D"], scale: Float32[Array, " D"], bias: Float32[Array, " D"], groups: int, eps: float
) -> Float32[Array, "B *space D"]:
    """Returns (x - mean) / sqrt(variance + eps) * scale + bias, float32, with moments over positions and group.

    x: [B ... D].  scale, bias: float32 [D].  With x' the normalised rows and g the gradient times scale,
    dx = (g - mean(g) - x' mean(g x')) / sqrt(variance + eps).  This reads x and the incoming gradient twice; automatic
    differentiation would read them five times.
    """
    return _group_norm_forward(x, scale, bias, groups, eps)[0]


def _group_norm_forward(x, scale, bias, groups, eps):
    rows, space = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
    centre = _group_mean(rows.mean(space), groups)
    variance = _group_mean(jnp.square(rows - _spread(centre, x)).mean(space), groups)
    return _normalise(x, scale, bias, centre, variance, eps), (x, scale, centre, lax.rsqrt(variance + eps))


def _normalise(x, scale, bias, centre, variance, eps):
    """Returns x normalised by moments [B groups]."""
    shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
    factor = lax.rsqrt(_spread(variance, x) + eps) * scale.reshape(shape)
    return x.astype(jnp.float32) * factor + (bias.reshape(shape) - _spread(centre, x) * factor)


def _group_norm_backward(groups, eps, kept, grad):
    x, scale, centre, inverse = kept
    space, shape = tuple(range(1, x.ndim - 1)), (1,) * (x.ndim - 1) + (x.shape[-1],)
    size = math.prod(x.shape[1:-1])
    normal = (x.astype(jnp.float32) - _spread(centre, x)) * _spread(inverse, x)
    bias_grad, scale_grad = grad.sum(space), (grad * normal).sum(space)  # [B D]
    mean = _group_mean(bias_grad * scale[None], groups) / size
    along = _group_mean(scale_grad * scale[None], groups) / size
    moved = grad * scale.reshape(shape) - _spread(mean, x) - normal * _spread(along, x)
    return (_spread(inverse, x) * moved).astype(x.dtype), scale_grad.sum(0), bias_grad.sum(0)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _group_mean(values, groups):
    """Returns the mean of each group's channels [B groups] of [B D]."""
    return values.reshape(len(values), groups, -1).mean(-1)


def _spread(values, x):
    """Returns values [B groups] repeated for every channel of x [B ... D], as [B 1 .. D]."""
    each = jnp.repeat(values, x.shape[-1] // values.shape[1], axis=1)
    return each.reshape(len(x), *(1,) * (x.ndim - 2), x.shape[-1])


class LayerNorm(nn.Module):
    """Normalisation of the last axis with the exact variance; parameters scale and bias."""

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*space D"]) -> Float[Array, "*space D"]:
        scale = parameter(self, "scale", nn.initializers.ones_init(), x.shape[-1:])
        bias = parameter(self, "bias", zeros, x.shape[-1:])
        return _layer_norm(x, scale, bias, self.eps, jnp.dtype(self.dtype))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _layer_norm(x, scale, bias, eps, dtype):
    """Returns x normalised along its last axis, as `dtype`."""
    scale, bias = (p.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) for p in (scale, bias))
    rows = x.astype(jnp.float32)
    rows = rows - rows.mean(-1, keepdims=True)
    rows = rows * lax.rsqrt(jnp.square(rows).mean(-1, keepdims=True) + eps)
    return (rows * scale + bias).astype(dtype)


@jax.jit
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x Phi(x) with the exact normal distribution; its gradient is Phi(x) + x phi(x).

    XLA's CPU runs erf, and this gradient, twice as fast as Linen's erfc and its derivative.
    Source: Hendrycks and Gimpel 2016.
    """
    return _gelu(x)


@jax.custom_vjp
def _gelu(x):
    return x * _normal(x)


def _normal(x):
    return 0.5 * (1 + lax.erf(x * 0.5**0.5))


def _gelu_backward(x, grad):
    return (grad * (_normal(x) + x * jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


def split_heads(x: Float[Array, "B N D"], heads: int) -> Float[Array, "B N heads d"]:
    """Returns x [B N D] in the shape for attention, [B N heads d]."""
    return x.reshape(*x.shape[:2], heads, -1)


def join_heads(x: Float[Array, "B N heads d"]) -> Float[Array, "B N D"]:
    """Returns the heads [B N heads d] side by side, [B N D]."""
    return x.reshape(*x.shape[:2], -1)


def timestep_embedding(
    t: Num[Array, " B"], width: int, flip_sin_to_cos: bool = True, shift: int = 0
) -> Float32[Array, "B width"]:
    """Returns sines and cosines of t [B] at width / 2 frequencies 10000^(-i / (width / 2 - shift)), float32 [B width].

    flip_sin_to_cos puts the cosines first.  An odd width ends in a zero.
    Source: Vaswani et al. 2017, 3.5; options as in diffusers' Timesteps.
    """
    half = width // 2
    rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * rates[None]
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


class ResnetBlock(nn.Module):
    """A residual block [B h w in] -> [B h w features]: norm, silu, conv, time added, norm, silu, conv, plus its input.

    time: embedding of the time [B T], or None for a network without time (and without time_emb_proj).
    zero: start as the identity, with zeros in the last convolution.
    """

    features: int
    groups: int = 32
    eps: float = 1e-5
    zero: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w in"], time: Float[Array, "B T"] | None = None
    ) -> Float[Array, "B h w features"]:
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


class MapAttention(nn.Module):
    """Attention of a map [B h w D] to itself over all positions, added to it."""

    heads: int = 1
    groups: int = 32
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
        width = x.shape[-1]
        rows = GroupNorm(self.groups, self.eps, self.dtype, name="group_norm")(x).reshape(len(x), -1, width)  # [B N D]
        q, k, v = (split_heads(Dense(width, dtype=self.dtype, name=f"to_{name}")(rows), self.heads) for name in "qkv")
        rows = join_heads(self.attend(q, k, v))
        return x + Dense(width, dtype=self.dtype, name="to_out.0")(rows).reshape(x.shape)

    def attend(
        self, q: Float[Array, "B N heads d"], k: Float[Array, "B M heads d"], v: Float[Array, "B M heads d"]
    ) -> Float[Array, "B N heads d"]:
        """Returns the attention [B N heads d] of q, k, v [B N heads d]; a method, so that hooks can wrap it."""
        return product(attend(q, k, v))


class Downsample(nn.Module):
    """Halves the size by a 3x3 convolution of stride 2.  padding: 1 in UNets, ((0, 1), (0, 1)) in VAE encoders."""

    features: int
    padding: int | Pads = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B _ _ features"]:
        return Conv(self.features, strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles the size, or resizes to `size` (h, w), by the nearest position; then a 3x3 convolution."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"], size: Sequence[int] | None = None) -> Float[Array, "B _ _ features"]:
        x = repeat(x, size or (2 * x.shape[1], 2 * x.shape[2]))
        return Conv(self.features, dtype=self.dtype, name="conv")(x)


def repeat(x: Float[Array, "B h w D"], size: Sequence[int]) -> Float[Array, "B _ _ D"]:
    """Returns x [B h w D] resized to `size` by the nearest position, index floor(i * h / size)."""
    for axis, length in zip((1, 2), size, strict=True):
        if length != x.shape[axis]:
            factor, rest = divmod(length, x.shape[axis])
            take = jnp.arange(length) * x.shape[axis] // length
            x = x.take(take, axis) if rest else x.repeat(factor, axis)
    return x
