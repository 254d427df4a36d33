"""Muon: orthogonal updates for kernels, another optimizer's updates for all other weights.

    inner = optax.chain(optax.clip_by_global_norm(1.0), scale_by_muon(0.9, optax.scale_by_adam(0.9, 0.999)))
    tx = packed(inner)

A small model has one stack of kernels for each size, and one vector of all other weights, since hundreds of arrays
compile far slower.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon as orthogonal_momentum

from sdjax import trees

SMALL = 1 << 24  # most numbers of a small model; larger stacks, which are copies, would take too much memory
ITERATIONS, FACTORS = 5, (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024


def packed(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation of trees of weights that runs `inner` on {key: stack of matrices, or vector}."""

    def rows(tree):
        return jax.tree.leaves(trees.map_names(_rows, tree))

    def update(updates, state, params=None):
        given = rows(updates)
        changed, state = inner.update(_join(given), state, None if params is None else _join(rows(params)))
        leaves, treedef = jax.tree.flatten(updates)
        parts = zip(leaves, _divide(changed, given), strict=True)
        return treedef.unflatten([part.reshape(leaf.shape) for leaf, part in parts]), state

    return optax.GradientTransformation(lambda params: inner.init(_join(rows(params))), update)


def scale_by_muon(beta: float, rest: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation of packed trees: orthogonal updates for stacks of matrices, `rest` for vectors.

    With U S V^T the singular value decomposition of a matrix's momentum, the update is close to
    0.2 sqrt(max(rows, columns)) U V^T.  Its root mean square is 0.2, like AdamW's usual updates, so that both work with
    the same rates.
    Source: Jordan et al. 2024, "Muon"; the factor: Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2.
    """
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    momentum = orthogonal_momentum(  # without iterations: Nesterov's momentum, divided by its norm
        beta=beta, ns_steps=0, weight_dimension_numbers=partial(jax.tree.map, lambda _: numbers)
    )
    return optax.partition(
        {"matrices": optax.chain(momentum, optax.stateless(lambda tree, _: orthogonal(tree))), "rest": rest},
        partial(jax.tree.map, lambda x: "matrices" if x.ndim == 3 else "rest"),
    )


def orthogonal(tree: Any) -> Any:
    """Returns 0.2 sqrt(max(rows, columns)) X after 5 iterations X <- Q X, Q = a + b A + c A^2, A = X X^T, for each X.

    Every Q is a polynomial of the first A, so all Q commute.  With A <- Q A Q, their product is computed without X.  So
    sizes with the same smaller side iterate as one stack, which compiles and runs faster.
    tree: stacks [count rows columns] of matrices with norm at most 1.
    """
    stacks, treedef = jax.tree.flatten(tree)
    wide = [x if x.shape[1] <= x.shape[2] else x.swapaxes(1, 2) for x in stacks]
    grams = [_product(x, x.swapaxes(1, 2)) for x in wide]
    factors = _divide({key: _factor(gram) for key, gram in _join(grams).items()}, grams)
    made = [0.2 * x.shape[2] ** 0.5 * _product(factor, x) for factor, x in zip(factors, wide, strict=True)]
    turned = zip(made, stacks, strict=True)
    return treedef.unflatten([y if y.shape == x.shape else y.swapaxes(1, 2) for y, x in turned])


def _factor(gram):
    """Returns the product of the iterations' Q for a stack of X X^T."""
    (a, b, c), factor = FACTORS, None
    for _ in range(ITERATIONS):
        q = a * jnp.eye(gram.shape[1], dtype=gram.dtype)[None] + b * gram + c * _product(gram, gram)
        factor = q if factor is None else _product(q, factor)
        gram = _product(_product(q, gram), q)  # unused after the last one
    return factor


def _product(x, y):
    """Returns x y in full float32: rounding gives eigenvalues below 0, which each iteration enlarges 12 times."""
    return jnp.matmul(x, y, precision="highest")


def _rows(name, x):
    """Returns a kernel [a b in out], [count in out] or [in out] as matrices [count rows columns]; other leaves flat."""
    if name.endswith("kernel"):
        rows, columns = math.prod(x.shape[:3]) if x.ndim == 4 else x.shape[-2], x.shape[-1]
        if min(rows, columns) > 1:
            return x.reshape(-1, rows, columns)
    return x.ravel()


def _keys(arrays):
    """Returns a key for each array: arrays of one size share it, or none do if all together are not small."""
    apart = trees.count(arrays) > SMALL
    return ["x".join(map(str, [number] * apart + [*x.shape[1:]])) for number, x in enumerate(arrays)]


def _join(arrays):
    """Returns {key: the concatenated arrays with this key}."""
    groups = {}
    for key, x in zip(_keys(arrays), arrays, strict=True):
        groups.setdefault(key, []).append(x)
    return {key: jnp.concatenate(group) for key, group in groups.items()}


def _divide(stacks, arrays):
    """Inverts _join: returns the parts of its stacks that correspond to `arrays`."""
    taken, parts = dict.fromkeys(stacks, 0), []
    for key, x in zip(_keys(arrays), arrays, strict=True):
        start, taken[key] = taken[key], taken[key] + len(x)
        parts.append(jax.lax.slice_in_dim(stacks[key], start, taken[key]))
    return parts
