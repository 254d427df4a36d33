"""The layer that a delta changes, initial random factors, and dropout."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key

from sdjax.models.axes import from_file, to_file
from sdjax.models.kernels.convolution import convolve_wide
from sdjax.models.kernels.convolution_plain import Pads
from sdjax.models.layers import multiply


@dataclass(frozen=True)
class Layer:
    """A linear layer, or a convolution with strides and pads.

    kernel: its weight in Flax's layout.  dtype: the type that it computes in.
    """

    kernel: Any
    dtype: Any
    strides: int = 1
    pads: Pads | None = None

    @functools.cached_property
    def weight(self) -> Float32[Array, "out inputs *size"]:
        """The weight in PyTorch's layout."""
        return to_file(self.kernel.astype(jnp.float32))

    def product(self, x: Float[Array, "B *space in"], weight: Float[Array, "..."]) -> Float32[Array, "B *space out"]:
        """Returns the layer's output for x with another weight [out in ...], without bias."""
        if self.pads is None:
            return multiply(x, from_file(weight), True, self.dtype)
        weight = weight.reshape(*weight.shape, 1, 1) if weight.ndim == 2 else weight
        return convolve_wide(x.astype(self.dtype), from_file(weight).astype(self.dtype), self.strides, self.pads)

    def mix(self, x: Float[Array, "*space in"], matrix: Float[Array, "out in"]) -> Float32[Array, "*space out"]:
        """Returns x times a matrix at every position."""
        return multiply(x, matrix.T, True, self.dtype)


@dataclass(frozen=True)
class Draw:
    """Random numbers from the host, so that shapes do not compile.  random: a numpy generator."""

    random: np.random.Generator

    def uniform(self, *shape: int) -> Float32[Array, "..."]:
        """Returns numbers from -b to b, b = 1 / sqrt(inputs).

        This is torch's kaiming_uniform_(a=sqrt(5)), the default of its layers.
        """
        bound = float(np.prod(shape[1:])) ** -0.5
        return jnp.asarray(self.random.uniform(-bound, bound, shape).astype(np.float32))

    def normal(self, deviation: float, *shape: int) -> Float32[Array, "..."]:
        """Returns normal numbers with mean 0."""
        return jnp.asarray(deviation * self.random.standard_normal(shape, np.float32))

    def zeros(self, *shape: int) -> Float32[Array, "..."]:
        """Returns zeros."""
        return jnp.asarray(np.zeros(shape, np.float32))


@dataclass(frozen=True)
class Drop:
    """Dropout per example; without keys nothing is dropped.

    keys: one per example [B], or None.  units: rate of single numbers.  ranks: rate of whole channels, the same at all
    positions.  Kept values are divided by 1 - rate.
    """

    keys: Key[Array, " B"] | None = None
    units: float = 0.0
    ranks: float = 0.0

    def inner(self, h: Float32[Array, "B *space r"]) -> Float32[Array, "B *space r"]:
        """Returns the values between LoRA's factors after dropout of numbers and ranks."""
        return self.channels(self._kept(h, self.units, "units", h.shape[1:]))

    def channels(self, y: Float32[Array, "B *space out"]) -> Float32[Array, "B *space out"]:
        """Returns y after dropout of channels."""
        return self._kept(y, self.ranks, "ranks", (*(1,) * (y.ndim - 2), y.shape[-1]))

    def _kept(self, x, rate, use, shape):
        if self.keys is None or not rate:
            return x
        return x * kept(self.keys, rate, use, len(x), shape) / (1 - rate)


def kept(keys: Key[Array, " B"], rate: float, use: str, rows: int, shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """Returns ones, and zeros with probability `rate`, for every row [rows *shape]; row i takes the key i modulo B."""
    number = {"units": 0, "ranks": 1, "module": 2}[use]
    keys = jnp.tile(keys, -(-rows // len(keys)))[:rows]
    draw = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, shape))
    return draw(keys).astype(jnp.float32)
