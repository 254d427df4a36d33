"""The sum of several adapters' changes to a weight: W + sum_i s_i D_i(W), with every D_i from the unmerged W.

    tree = merge(sd.parts["unet"], {name: ((edit, 0.8),) for name, edit in adapter.edits["unet"].items()})

So the order of adapters does not matter, and the sum, in float32, is rounded once.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from sdjax import trees
from sdjax.formats.storage import parameters
from sdjax.trees import Tree


class Edit(Protocol):
    """A weight's change, a pytree of arrays; what is compiled for one serves all of the same structure and shapes."""

    def change(self, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns D(W), W in a file's layout, [out in] or [out in height width]; ValueError where shapes don't fit."""
        ...


Stack = tuple[tuple[Any, float], ...]  # Edits of one weight, each with its strength


def merge(tree: Tree, stacks: Mapping[str, Stack]) -> Tree:
    """Returns the tree with W + sum_i s_i D_i(W) for every W in stacks, {dotted name: ((Edit, strength), ...)}.

    The sum is float32 and cast once.
    """
    return trees.map_names(lambda name, weight: _merged(weight, stacks[name]) if name in stacks else weight, tree)


def _merged(weight, stack):
    edits, strengths = zip(*((edit, np.float32(strength)) for edit, strength in stack), strict=True)
    return summed(weight, edits, strengths)


@jax.jit
def summed(
    weight: Float[Array, "*shape"], edits: tuple[Edit, ...], strengths: tuple[Any, ...]
) -> Float[Array, "*shape"]:
    """Returns a weight in our layout with edits of several strengths: arrays, so that no other strength compiles."""
    to_file, from_file = parameters.TO_FILE.get(weight.ndim, (0,)), parameters.FROM_FILE.get(weight.ndim, (0,))
    base = weight.astype(jnp.float32).transpose(to_file)
    changes = (strength * edit.change(base) for edit, strength in zip(edits, strengths, strict=True))
    return (base + sum(changes)).transpose(from_file).astype(weight.dtype)
