"""Edits of weights: what a method or a file changes in one weight, and the weight with all of its edits.

    tree = merge(sd.parts["unet"], {"conv_in.kernel": ((Factored({"down": a, "up": b, "scale": 1.0}), 0.8),)})

A merged weight is W + sum_i s_i D_i(W), with D_i from the unmerged W, so that the order of edits does not matter.
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
    """A weight's change, a pytree of arrays; what is compiled for one serves all of the same structure and shapes."""

    def change(self, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns D(W), W in a file's layout, [out in] or [out in height width]; ValueError where shapes don't fit."""
        ...


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factors"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Factored(Edit):
    """A change by factors {name: array} with a file's axes; their names decide on the formula, see deltas."""

    factors: dict[str, Any]

    def change(self, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns D(W), float32, of the kind that the names make."""
        wide = {name: jnp.asarray(value, jnp.float32) for name, value in self.factors.items()}
        return deltas.of(wide).change(wide, weight)


Stack = tuple[tuple[Edit, Any], ...]  # edits of one weight, each with its strength


def merge(tree: Tree, stacks: Mapping[str, Stack], dtype: DTypeLike | None = None) -> Tree:
    """Returns the tree with W + sum_i s_i D_i(W) for every W in stacks, {dotted name: ((Edit, strength), ...)}.

    The sum is float32 and cast once, to W's type or to `dtype`.
    """

    def changed(name, weight):
        return _merged(weight, stacks[name], dtype or weight.dtype) if name in stacks else weight

    return trees.map_names(changed, tree)


def _merged(weight, stack, dtype):
    edits, strengths = zip(*((edit, jnp.float32(strength)) for edit, strength in stack), strict=True)
    return summed(weight, edits, strengths, dtype=jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def summed(
    weight: Float[Array, "*shape"], edits: tuple[Edit, ...], strengths: tuple[Any, ...], dtype: Any = None
) -> Float[Array, "*shape"]:
    """Returns a weight in our layout with edits of several strengths, in `dtype` (None: the weight's).

    Strengths are arrays, so that no other strength compiles.
    """
    base = to_file(weight.astype(jnp.float32))
    changes = (strength * edit.change(base) for edit, strength in zip(edits, strengths, strict=True))
    return from_file(base + sum(changes)).astype(dtype or weight.dtype)
