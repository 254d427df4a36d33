"""Converts between PyTorch weight files and parameter trees: same names, three leaf rules, a few older spellings.

A Linen leaf's dotted path is its key in the file, except for the leaf's own name (kernel, scale and embedding become
`weight`) and the order of a kernel's axes.  Names are never parsed: all are generated from the network and looked up.

    params = read(open_weights(folder, "model"), network, "text_encoder", dtype="float16")
    tensors = write(params)                                # {name: Tensor}, the other way round
"""

import functools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Num

from sdjax import trees
from sdjax.formats.storage.files import TYPES, Stored, Tensor
from sdjax.models.axes import FROM_FILE, TO_FILE
from sdjax.trees import Tree

Network = Any  # a Linen module with `example()`, see families/family.py
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}  # all other leaves keep their name
# Self-attention of maps before diffusers 0.15, in the autoencoder and in LDM-SR's UNet.
OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
# Optional prefixes: transformers 5.6 and later writes none for separate towers.
PREFIXES = {"text_encoder": "text_model.", "image_encoder": "vision_model."}
# Entries that are not weights of a part: position numbers, and the other half of a CLIPModel.
IGNORED = {
    "text_encoder": ("text_model.embeddings.position_ids", "embeddings.position_ids"),
    "image_encoder": (
        *("vision_model.embeddings.position_ids", "embeddings.position_ids", "logit_scale"),
        *("text_projection.", "text_model."),
    ),
}


def initialise(network: Network, key: Key[Array, ""]) -> Tree:
    """Returns a network's initial parameters for training from scratch."""
    return dict(network.init(key, **network.example())["params"])


def template(network: Network) -> Tree:
    """Returns the tree of shapes of a network's parameters; computes nothing."""
    one = network.clone(dtype=jnp.float32)  # one template for all types
    return _template(one)


@functools.lru_cache(maxsize=64)
def _template(network: Network) -> Tree:
    return jax.eval_shape(lambda: initialise(network, jax.random.key(0)))


def random_parameters(network: Network, dtype: DTypeLike, seed: int = 0) -> Tree:
    """Returns parameters for measurements and tests: kernels and tables normal, scales 1, biases 0; no kernel is zero.

    Kernels have variance 1 / inputs.  Each leaf depends only on its name and the seed.
    """

    def draw(name: str, leaf: jax.ShapeDtypeStruct) -> Float[Array, "..."]:
        kind = name.rpartition(".")[2]
        if kind == "scale":
            values = np.ones(leaf.shape, np.float32)
        elif kind == "bias":
            values = np.zeros(leaf.shape, np.float32)
        else:
            number = np.random.default_rng([seed, *name.encode()])
            values = number.standard_normal(leaf.shape, np.float32)
            values *= 0.02 if kind != "kernel" else float(np.prod(leaf.shape[:-1])) ** -0.5
        return jnp.asarray(values.astype(jnp.dtype(dtype)))

    like = trees.flatten(template(network))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # numpy releases Python's lock here
        made = dict(zip(like, threads.map(draw, like, like.values()), strict=True))
    return trees.unflatten(made, template(network))


def new_parameters(network: Network, dtype: DTypeLike, seed: int = 0) -> Tree:
    """Returns a network's initial parameters for a seed, for training from scratch."""
    return trees.cast(jax.jit(initialise, static_argnums=0)(network, jax.random.key(seed)), dtype)


def file_names(tree: Tree) -> dict[str, str]:
    """Returns {name in a file: dotted name} for all leaves of a parameter tree."""
    return {".".join([*path[:-1], LEAVES.get(path[-1], path[-1])]): name for name, path in trees.names(tree).items()}


def read(
    weights: Stored, network: Network, part: str | None, dtype: DTypeLike | None = None, zero: Collection[str] = ()
) -> Tree:
    """Returns the parameters of a network from weights, read one tensor at a time.

    dtype: type of the parameters; None keeps the stored types, but float64 becomes float32.
    zero: file names that may be missing and are then zeros.
    Raises ValueError naming the file and up to ten missing, unexpected or misshapen weights, with their number.
    """
    check_layers(weights, network.config)
    return read_tree(weights, template(network), dtype, part, zero)


def check_layers(weights: Stored, config: Any) -> None:
    """Raises ValueError, naming the file, for a config with more layers than weights; runs before the template."""
    if config.layers > len(weights.names):
        raise ValueError(
            f"{weights.path}: does not fit its config.json: {config.layers} layers, {len(weights.names)} weights"
        )


def read_tree(
    weights: Stored,
    like: Tree,
    dtype: DTypeLike | None = None,
    part: str | None = None,
    zero: Collection[str] = (),
    sizes: str = "its config.json",
) -> Tree:
    """Returns a tree with the structure of `like` from weights; otherwise see `read`.

    like: its leaves need only shapes.  sizes: the source of these shapes, for the message.
    Raises ValueError naming the file and up to ten missing, unexpected or misshapen weights, with their number.
    """
    shapes = trees.flatten(like)
    places = {leaf: name for name, leaf in file_names(like).items()}
    found, unexpected = _look_up(weights.names, places, part)
    missing = sorted(name for leaf, name in places.items() if leaf not in found and name not in zero)
    misshapen = sorted(filter(None, (_misfit(weights, name, leaf, shapes[leaf].shape) for leaf, name in found.items())))
    problems = {"missing": missing, "unexpected": sorted(unexpected), "misshapen": misshapen}
    if missing or unexpected or misshapen:
        text = "; ".join(f"{kind} {_listing(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{weights.path}: does not fit {sizes}: {text}")

    def take(leaf: str, shape: jax.ShapeDtypeStruct) -> Num[Array, "..."]:
        if leaf not in found:
            return jnp.zeros(shape.shape, dtype or jnp.float32)
        return _array(weights, found[leaf], leaf, shape.shape, dtype)

    return trees.map_names(take, like)


def _listing(names: Sequence[str]) -> str:
    return trees.listing(names) if len(names) > 10 else f"{trees.listing(names)} ({len(names)})"


def _look_up(names: Iterable[str], places: Mapping[str, str], part: str | None) -> tuple[dict[str, str], list[str]]:
    """Returns ({leaf: its name in this file}, unexpected names)."""
    names = [name for name in names if not name.startswith(IGNORED.get(_kind(part), ()))]
    accepted = {spelling: leaf for leaf, name in places.items() for spelling in _spellings(name, part)}
    found, unexpected = {}, []
    for name in names:
        leaf = accepted.get(name)
        if leaf is None or leaf in found:
            unexpected.append(name)
        else:
            found[leaf] = name
    return found, unexpected


def _kind(part: str | None) -> str:
    """Returns a part's name without its number: text_encoder for text_encoder_2."""
    return (part or "").rstrip("0123456789").removesuffix("_")


def _spellings(name: str, part: str | None) -> list[str]:
    """Returns all names of a weight in files, the current one first."""
    prefix = PREFIXES.get(_kind(part))
    if prefix:
        return [name, name.removeprefix(prefix)]
    old = name
    if part in ("vae", "unet") and ".attentions." in name and ".transformer_blocks." not in name:
        for new, before in OLD_ATTENTION.items():
            old = old.replace(new, before)
    return [name, old]


def _misfit(weights: Stored, name: str, leaf: str, shape: tuple[int, ...]) -> str | None:
    """Returns the mismatch of a tensor in the file, or None.  A 1 x 1 convolution fits a linear layer."""
    there, wanted = weights.shape(name), _file_shape(leaf, shape)
    if weights.dtype(name) not in TYPES.values():
        return f"{name} of type {weights.dtype(name)} instead of floating point"
    same = there == wanted or _is_kernel(leaf) and _matrix(there) == _matrix(wanted)
    return None if same else f"{name} {list(there)} instead of {list(wanted)}"


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if set(shape[2:]) <= {1} else shape


def _is_kernel(leaf: str) -> bool:
    return leaf.endswith(".kernel")


def _file_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in TO_FILE[len(shape)]) if _is_kernel(leaf) else tuple(shape)


def _array(weights: Stored, name: str, leaf: str, shape: tuple[int, ...], dtype: DTypeLike | None) -> Num[Array, "..."]:
    array = weights.read(name)
    if _is_kernel(leaf):
        array = array.reshape(_file_shape(leaf, shape)).transpose(FROM_FILE[len(shape)])
    stored = jnp.float32 if weights.dtype(name) == "F64" else array.dtype
    return jnp.asarray(np.asarray(_cast(array, dtype or stored, f"{weights.path}: {name}"), order="C"))


def _cast(array: np.ndarray, dtype: DTypeLike, what: str) -> np.ndarray:
    try:
        with np.errstate(over="raise"):
            return array.astype(jnp.dtype(dtype), copy=False)
    except FloatingPointError:
        raise ValueError(f"{what} holds values beyond {jnp.dtype(dtype).name}; keep it float32") from None


def write(params: Tree, dtype: DTypeLike | None = None) -> dict[str, Tensor]:
    """Returns {name in a file: Tensor} of a parameter tree; writing the file computes one array at a time."""
    flat = trees.flatten(params)
    return {name: _tensor(leaf, flat[leaf], dtype) for name, leaf in file_names(params).items()}


def _tensor(leaf: str, value: Num[Array, "..."], dtype: DTypeLike | None) -> Tensor:
    dtype = jnp.dtype(dtype or value.dtype)

    def array() -> np.ndarray:
        there = _cast(np.asarray(value), dtype, leaf)
        return there.transpose(TO_FILE[there.ndim]) if _is_kernel(leaf) else there

    return Tensor(_file_shape(leaf, value.shape), dtype, array)
