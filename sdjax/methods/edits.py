"""Edits: changes of single weights by methods or files, and the sum of all edits of a weight.

    tree = merge(sd.parts["unet"], {"conv_in.kernel": ((Factored({"down": a, "up": b, "scale": 1.0}), 0.8),)})

A merged weight is W + sum_i s_i D_i(W); every D_i takes the unmerged W, so the order of edits does not matter.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from sdjax import trees
from sdjax.methods import deltas
from sdjax.models.axes import from_file, to_file
from sdjax.trees import Tree


class Edit(Protocol):
    """The change of a weight, a pytree of arrays; edits of equal structure and shapes share compiled code."""

    def change(self, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns D(W); W has a file's layout, [out in] or [out in height width].

        Raises ValueError if shapes do not fit.
        """
        ...


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factors"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Factored(Edit):
    """A change by factors {name: array} with a file's axes; their names decide the kind, see deltas."""

    factors: dict[str, Any]

    def change(self, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns D(W), float32."""
        wide = {name: jnp.asarray(value, jnp.float32) for name, value in self.factors.items()}
        return deltas.of(wide).change(wide, weight)


Stack = tuple[tuple[Edit, Any], ...]  # edits of one weight, each with its strength


def merge(tree: Tree, stacks: Mapping[str, Stack], compute: DTypeLike = jnp.float32) -> Tree:
    """Returns the tree with W + sum_i s_i D_i(W) for every W in stacks, {dotted name: ((Edit, strength), ...)}.

    compute: the network's compute type.  With float32 the changed weights become float32.  With a narrower type they
    keep their own type and are rounded to a value of `compute`, see `dithered`.
    """
    compute = jnp.dtype(compute)

    def changed(name, weight):
        return _merged(weight, stacks[name], compute) if name in stacks else weight

    return trees.map_names(changed, tree)


def _merged(weight, stack, compute):
    edits, strengths = zip(*((edit, jnp.float32(strength)) for edit, strength in stack), strict=True)
    return summed(weight, edits, strengths, compute=compute)


@functools.partial(jax.jit, static_argnames="compute")
def summed(
    weight: Float[Array, "*shape"], edits: tuple[Edit, ...], strengths: tuple[Any, ...], compute: Any = jnp.float32
) -> Float[Array, "*shape"]:
    """Returns a weight in Flax's layout with its edits at their strengths, for a network that computes in `compute`.

    Strengths are arrays, so that another strength does not recompile.
    """
    base = to_file(weight.astype(jnp.float32))
    changes = (strength * edit.change(base) for edit, strength in zip(edits, strengths, strict=True))
    total = from_file(base + sum(changes))
    return total if jnp.dtype(compute) == jnp.float32 else dithered(total, compute).astype(weight.dtype)


def dithered(x: Float32[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """Returns x in a narrower type, rounded up or down at random so that the expected value is x.

    Rounding to the nearest value would lose changes below half a unit in W's last place.  Values of the narrower type
    do not change.  The random number is a hash of the element's position and of x, the same in every call (our choice:
    murmur3's finaliser).  Of the position alone it would be the same in all layers of a shape, and in all files.
    """
    near = x.astype(dtype)
    rest = x - near.astype(jnp.float32)
    other = jnp.nextafter(near, jnp.where(rest < 0, -jnp.inf, jnp.inf).astype(dtype))
    step = jnp.abs(other.astype(jnp.float32) - near.astype(jnp.float32))
    return jnp.where(_chance(x) * step < jnp.abs(rest), other, near)


def _chance(x):
    """Returns pseudo-random numbers in [0, 1), one per entry of float32 x."""
    bits = jax.lax.iota(jnp.uint32, x.size) ^ jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return ((bits ^ (bits >> 16)) >> 8).astype(jnp.float32).reshape(x.shape) / 2**24
