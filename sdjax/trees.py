"""Parameter trees addressed by dotted name, and random keys addressed by name and example.

A Linen tree is nested dicts whose keys may hold dots themselves ("down_blocks.0"), so ".".join(path) is the key of the
same weight in a diffusers file.  `unflatten` therefore needs a tree of the same structure; names are never parsed.

    matching(sd.parts["unet"], r"attn\\d\\.to_q\\.kernel$")
    edit(sd.parts["unet"], r"attn\\d\\.to_q\\.kernel$", lambda name, w: w * 2)
"""

import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Key

Tree = dict[str, Any]  # nested dicts of arrays, or of their shapes
T = TypeVar("T")


def _walk(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _walk(value, (*path, key))
    else:
        yield path, tree


def names(tree: Tree) -> dict[str, tuple[str, ...]]:
    """Returns {dotted name: path} of every leaf, in the tree's order."""
    return {".".join(path): path for path, _ in _walk(tree)}


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns {dotted name: leaf} of a tree of nested dicts, in the tree's order."""
    return {".".join(path): leaf for path, leaf in _walk(tree)}


def unflatten(flat: Mapping[str, Any], like: Tree) -> Tree:
    """Returns a tree of the structure of `like` with the leaves of `flat`, {dotted name: leaf}.

    Raises ValueError if the names of `flat` and `like` differ.
    """
    wanted = names(like)
    missing, extra = sorted(wanted.keys() - flat.keys()), sorted(flat.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(f"weights do not fit: missing {listing(missing)}; unexpected {listing(extra)}")
    return map_names(lambda name, _: flat[name], like)


def listing(items: Iterable[object], most: int = 10) -> str:
    """Returns up to `most` items as text and how many there are: "a, b, ... (12)"."""
    items = list(items)
    shown = ", ".join(str(item) for item in items[:most])
    return (f"{shown}, ... ({len(items)})" if len(items) > most else shown) or "none"


def map_names(change: Callable[[str, Any], Any], tree: Any, path: tuple[str, ...] = ()) -> Any:
    """Returns the tree with every leaf replaced by change(dotted name, leaf)."""
    if isinstance(tree, dict):
        return {key: map_names(change, value, (*path, key)) for key, value in tree.items()}
    return change(".".join(path), tree)


def matching(tree: Tree, pattern: str) -> dict[str, Any]:
    """Returns {dotted name: leaf} of the leaves whose name contains a match of the regular expression."""
    found = re.compile(pattern)
    return {name: leaf for name, leaf in flatten(tree).items() if found.search(name)}


def edit(tree: Tree, pattern: str, change: Callable[[str, Any], Any]) -> Tree:
    """Returns the tree with change(name, leaf) in place of every leaf whose name matches the regular expression."""
    found = re.compile(pattern)
    return map_names(lambda name, leaf: change(name, leaf) if found.search(name) else leaf, tree)


def partition(tree: Tree, pattern: str) -> tuple[Tree, Tree]:
    """Returns (chosen, rest): the tree's leaves whose names match a regular expression, and the others."""
    found = re.compile(pattern)
    chosen, rest = {}, {}
    for path, leaf in _walk(tree):
        branch = chosen if found.search(".".join(path)) else rest
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return chosen, rest


def merge(one: Any, other: Any) -> Any:
    """Returns a tree with the leaves of both; leaves in both come from `other`."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    both = one | other
    return {key: merge(one[key], leaf) if key in one and key in other else leaf for key, leaf in both.items()}


def cast(tree: T, dtype: DTypeLike) -> T:
    """Returns the tree with every floating-point leaf in `dtype`; integers and keys stay.

    An array in several places stays one array, so that it takes memory once.
    """
    made = {}

    def change(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if id(x) not in made:
            made[id(x)] = x.astype(dtype)
        return made[id(x)]

    return jax.tree.map(change, tree)


def copy(tree: T, dtype: DTypeLike | None = None) -> T:
    """Returns the tree with every leaf in its own buffer, so that the original survives donation.

    dtype: of the copy's floating-point leaves; None keeps each.
    """
    return _copy(tree, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _copy(tree, dtype):  # one program for the whole tree instead of one per shape
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree if dtype is None else cast(tree, dtype))


def count(tree: Any) -> int:
    """Returns the number of numbers in a tree of arrays."""
    return sum(x.size for x in jax.tree.leaves(tree))


def digest(tree: Any) -> str:
    """Returns the first 16 hex digits of a SHA-256 over names, types, shapes and bytes, which identifies weights."""
    total = hashlib.sha256()
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tree), key=lambda pair: jax.tree_util.keystr(pair[0])):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return total.hexdigest()[:16]


def depends(function: Callable[[Any], Any], tree: Any) -> bool:
    """Returns whether anything that function(tree) computes may depend on the tree's arrays.

    It follows operations, not values; an inner call, such as of a compiled function, counts as one operation.
    """
    made = jax.make_jaxpr(function)(tree).jaxpr
    touched = set(made.invars)
    for equation in made.eqns:
        if not touched.isdisjoint(variables(equation.invars)):
            touched.update(equation.outvars)
    return not touched.isdisjoint(variables(made.outvars))


def variables(atoms: Iterable[Any]) -> list[Any]:
    """Returns the variables among the inputs or outputs of a jaxpr's equation; the others are constants."""
    return [x for x in atoms if not hasattr(x, "val")]


def seed_keys(seeds: Iterable[int]) -> Key[Array, " B"]:
    """Returns one key per seed: of its low 32 bits, with the high ones folded in where they are not 0."""
    words = [seed if abs(seed) >> 32 else seed % (1 << 32) for seed in seeds]
    low, high = np.array([(word & 0xFFFFFFFF, word >> 32 & 0xFFFFFFFF) for word in words], np.uint32).T
    keys = jax.vmap(jax.random.key)(low)
    if not high.any():
        return keys
    return jnp.where(high, jax.vmap(jax.random.fold_in)(jax.random.clone(keys), high), keys)


def seed_key(seed: int) -> Key[Array, ""]:
    """Returns the key of one seed; jax.random.key(seed) would leave out all bits but the low 32."""
    return seed_keys([seed])[0]


def named_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """Returns the key of a named use, fold_in(key, crc32(name)), which does not depend on other names."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def example_keys(key: Key[Array, ""], index: Int[Array, " B"]) -> Key[Array, " B"]:
    """Returns one key per example, fold_in(key, index[b]), which does not depend on the batch.  index: int [B]."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
