"""E4T's weight offsets: W' = W * (1 + D), where D has rank three, starts at zero and has its own generator per weight.

With kernels as Flax stores them, [in, out], a learned constant v and two linear maps a = L1(v) [in], b = L2(v) [out]:

    M0 = a b^T                       M1 = Wc M0 + bc 1^T                   D = M1 Wr^T + 1 br^T          (as published)
    D  = (Wc a)(Wr b)^T + bc (Wr 1)^T + 1 br^T                                                           (as computed)

so three outer products replace the products of full matrices.  Wr and br start at zero, so D = 0 at the start.  This is
our choice, since the paper's initialisation is not known and the prior must survive the first step.

Generators for weights of one shape are stacked, {"160x160": generator with leaves [n ...]}, in the order of the
weights' names.  This gives few, large operations, which compile several times faster.  Files hold one generator per
weight, see `by_name`.

Source: Gal et al. 2023 (arXiv 2302.12228), figure 2, "Weight Offsets".
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sdjax import trees
from sdjax.methods.branches import Branches
from sdjax.models.axes import to_file
from sdjax.trees import Tree

TARGETS = (
    r"attn[12]\.to_[qkv]\.kernel$"  # self- and cross-attention, queries, keys and values; to_out is not in the figure
)


def create(unet: Tree, key: Key[Array, ""] | None = None) -> Tree:
    """Returns {shape: stacked generators} for every target in the UNet's tree of arrays or shapes; offsets are zero.

    key=None: shapes only.
    """
    weights = trees.matching(unet, TARGETS)
    if key is None:
        return jax.eval_shape(
            lambda: by_shape(unet, {name: _generator(x.shape, _nothing, jnp.zeros) for name, x in weights.items()})
        )
    draws = {name: _uniform(trees.named_key(key, name)) for name in weights}
    return by_shape(unet, {name: _generator(x.shape, draws[name], _zeros) for name, x in weights.items()})


def groups(unet: Tree) -> dict[str, list[str]]:
    """Returns {shape, such as "160x160": sorted names of its targets} for a UNet's tree of arrays or shapes."""
    found = {}
    for name, weight in sorted(trees.matching(unet, TARGETS).items()):
        found.setdefault("x".join(map(str, weight.shape)), []).append(name)
    return found


def by_shape(unet: Tree, generators: Mapping[str, Any]) -> Tree:
    """Returns {shape: stacked generators} from {weight's name: generator}."""
    return {
        shape: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(generators[name] for name in names))
        for shape, names in groups(unet).items()
    }


def by_name(unet: Tree, stacked: Mapping[str, Any]) -> Tree:
    """Returns {weight's name: generator} from {shape: stacked generators}."""
    return {
        name: jax.tree.map(lambda leaf, i=i: leaf[i], stacked[shape])
        for shape, names in groups(unet).items()
        for i, name in enumerate(names)
    }


def _uniform(key):
    """Returns a function draw(shape, fan_in) -> float32, the initialisation of torch's Linear."""
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # on the host: nothing to compile per shape
    return lambda shape, fan_in: jnp.asarray(random.uniform(-(fan_in**-0.5), fan_in**-0.5, shape).astype(np.float32))


def _zeros(shape):
    return jnp.asarray(np.zeros(shape, np.float32))


def _nothing(shape, fan_in):
    return jnp.zeros(shape)


def _generator(shape, uniform, zeros):
    """Returns one generator, 1 + 2 in + 2 out + in^2 + in + out^2 + out numbers; uniform: see _uniform."""
    rows, columns = shape
    return {
        "v": jnp.ones(1),
        "linear1": {"kernel": uniform((1, rows), 1), "bias": uniform((rows,), 1)},
        "linear2": {"kernel": uniform((1, columns), 1), "bias": uniform((columns,), 1)},
        "linear_column": {"kernel": uniform((rows, rows), rows), "bias": uniform((rows,), rows)},
        "linear_row": {"kernel": zeros((columns, columns)), "bias": zeros((columns,))},
    }


def offset(generator: Mapping[str, Any]) -> Float[Array, "in out"]:
    """Returns D [in out] of one generator as the sum of three outer products (the module's formula)."""
    a = generator["v"] @ generator["linear1"]["kernel"] + generator["linear1"]["bias"]  # [in]
    b = generator["v"] @ generator["linear2"]["kernel"] + generator["linear2"]["bias"]  # [out]
    column, row = generator["linear_column"], generator["linear_row"]
    left = jnp.stack([a @ column["kernel"], column["bias"], jnp.ones_like(a)], axis=1)  # [in 3]
    right = jnp.stack([b @ row["kernel"], row["kernel"].sum(0), row["bias"]])  # [3 out]
    return left @ right


def moves(unet: Tree, stacked: Mapping[str, Any]) -> dict[str, Float[Array, "in out"]]:
    """Returns {weight's name: D} for every weight in the UNet's tree that has a generator."""
    found = {}
    for shape, names in groups(unet).items():
        found |= dict(zip(names, jax.vmap(offset)(stacked[shape]), strict=True))
    return found


def apply(unet: Tree, stacked: Mapping[str, Any]) -> Tree:
    """Returns the UNet's tree with W (1 + D), float32, for every W that has a generator.

    A narrower type would lose small offsets: a bfloat16 weight times 1.001 rounds to the same weight.
    """
    found = moves(unet, stacked)
    return trees.edit(unet, TARGETS, lambda name, weight: weight.astype(jnp.float32) * (1 + found[name]))


def beside(unet: Tree, stacked: Mapping[str, Any]) -> Branches:
    """Returns the hook that adds x (W * D) to a layer's output, for networks that compute in a narrower type."""
    factors = {name.removesuffix(".kernel"): {"relative": to_file(x)} for name, x in moves(unet, stacked).items()}
    return Branches({"unet": factors})
