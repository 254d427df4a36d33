"""Optimizers leaf by leaf: weights of one shape share one traced and lowered function.

    tx = leafwise(optax.scale_by_adam())

The 686 weights of a UNet have 40 shapes.  For a transformation whose update of a leaf depends on no other leaf, results
and state are the same as without this.
"""

from typing import Any

import jax
import optax


def leafwise(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the transformation that calls `inner` with each leaf as its own tree.

    Parts of the state that are not trees like the weights, such as a step count, come from the first leaf's call.
    """
    one = jax.jit(inner.update)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(updates)
        if not leaves:
            return inner.update(updates, state, params)

        def whole(x):
            return jax.tree.structure(x) == tree

        parts, around = jax.tree.flatten(state, is_leaf=whole)
        columns = [jax.tree.leaves(part) if whole(part) else [part] * len(leaves) for part in parts]
        weights = [None] * len(leaves) if params is None else tree.flatten_up_to(params)
        rows = zip(*columns, strict=True) if columns else [()] * len(leaves)
        made = [one(x, around.unflatten(row), w) for x, row, w in zip(leaves, rows, weights, strict=True)]
        states = zip(*(around.flatten_up_to(after) for _, after in made), strict=True)
        news = [tree.unflatten(new) if whole(part) else new[0] for part, new in zip(parts, states, strict=True)]
        return tree.unflatten([x for x, _ in made]), around.unflatten(news)

    return optax.GradientTransformation(inner.init, update)
