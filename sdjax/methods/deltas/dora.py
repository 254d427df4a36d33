"""DoRA: W' = m (W + D) / |W + D|, D of another kind, m the trained magnitudes.

m "outputs" [out], norms over all axes but the first (the paper, PEFT, LyCORIS' default), or "inputs" [in].
Gradients do not flow into the norm (the paper's section 4.3, as in PEFT).
Source: Liu et al. 2024 (arXiv 2402.09353), equation 5.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sdjax.methods import deltas
from sdjax.methods.deltas.delta import Delta, Factors
from sdjax.methods.deltas.layer import Draw, Drop, Layer

AXES = ("outputs", "inputs")  # axes of W that magnitudes may belong to


class Dora(Delta):
    """LoRA's factors with a trained magnitude per output or input."""

    name = "dora"
    ranked = ("down",)
    multiplied = ("down", "up", "mid")

    def matches(self, names: frozenset[str]) -> bool:
        """Returns whether the factors have magnitudes."""
        return bool(names & set(AXES))

    def start(self, weight: Float32[Array, "..."], rank: int, draw: Draw, settings: Any) -> dict[str, Array]:
        """Returns LoRA's factors, and m = |W|."""
        inner = deltas.of(("down", "up")).start(weight, rank, draw, settings)
        return {**inner, "outputs": jnp.sqrt(jnp.sum(jnp.square(weight.reshape(len(weight), -1)), 1))}

    def product(self, f: Factors) -> Float32[Array, "..."]:
        """Returns D of the inner kind; the change to W' would need W."""
        kind, inner, _ = _inside(f)
        return kind.product(inner)

    def change(self, f: Factors, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns W' - W."""
        kind, inner, axis = _inside(f)
        total = weight + kind.change(inner, weight)
        return total * _gain(f, total, axis) - weight

    def run(
        self, f: Factors, x: Float[Array, "B *space in"], y: Float32[Array, "B *space out"], layer: Layer, drop: Drop
    ) -> Float32[Array, "B *space out"]:
        """Returns g (y + D x) - y, g = m / |W + D|."""
        kind, inner, axis = _inside(f)
        if axis:
            return super().run(f, x, y, layer, drop)
        total = layer.weight + jax.lax.stop_gradient(kind.change(inner, layer.weight))
        gain = _gain(f, total, axis).reshape((1,) * (y.ndim - 1) + (-1,))
        return (gain - 1) * y + gain * kind.run(inner, x, y, layer, drop)


def _inside(f):
    """Returns (the inner kind, its factors, the axis of the magnitudes)."""
    inner = {name: value for name, value in f.items() if name not in AXES}
    return deltas.of(inner), inner, next(i for i, name in enumerate(AXES) if name in f)


def _gain(f, total, axis):
    """Returns m / |W + D| with the axes of W."""
    others = tuple(k for k in range(total.ndim) if k != axis)
    norm = jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(total)), others, keepdims=True))
    return f[AXES[axis]].reshape(norm.shape) / norm
