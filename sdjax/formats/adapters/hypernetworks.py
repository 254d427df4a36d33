"""A1111's hypernetworks: small networks on what attention takes its keys and values from, as a hook.

    k = to_k(x + s N_k(x))    v = to_v(x + s N_v(x))    q as before

x is the context of an attention, for attention to itself its own input; every width of x in the file has its own pair
(N_k, N_v), shared by all layers of that width.  N is a row of linear layers, each with an activation and a norm behind
it where the file says so.
Source: the file format and formula of AUTOMATIC1111's stable-diffusion-webui.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from sdjax import trees
from sdjax.models.kernels.precision import precision
from sdjax.models.layers import gelu
from sdjax.trees import Tree

# torch's activations by their lower-case names, with torch's default settings; swish is A1111's name for hardswish.
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leakyrelu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "swish": jax.nn.hard_swish,
    "hardswish": jax.nn.hard_swish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu": gelu,
    "mish": jax.nn.mish,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "relu6": jax.nn.relu6,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "logsigmoid": jax.nn.log_sigmoid,
    "hardtanh": jax.nn.hard_tanh,
    "hardsigmoid": jax.nn.hard_sigmoid,
    "tanhshrink": lambda x: x - jnp.tanh(x),
    "softshrink": lambda x: jnp.sign(x) * jax.nn.relu(jnp.abs(x) - 0.5),
    "hardshrink": lambda x: jnp.where(jnp.abs(x) > 0.5, x, jnp.zeros_like(x)),
}
OLD = {"linear1.": "linear.0.", "linear2.": "linear.1."}
WIDEST = 2**20  # of layers, as multiples of the context's width
EPSILON = 1e-5  # torch's LayerNorm


class Hypernetwork(struct.PyTreeNode):
    """The hook.  networks: {width: {"to_k": layers, "to_v": layers}}; a layer is a dict of arrays.

    strength: s, an array.  activations: the name of the activation behind each layer, or None; norms are layers.
    """

    networks: Any
    strength: Any
    activations: tuple[str | None, ...] = struct.field(pytree_node=False, default=())

    def intercept(self, part: str, layer: Callable, args: tuple, kwargs: dict[str, Any], at: Any, cond: Any) -> Any:
        if part == "unet" and at.module.name in ("to_k", "to_v") and at.method_name == "__call__":
            x, *rest = args
            if x.shape[-1] in self.networks:
                layers = self.networks[x.shape[-1]][at.module.name]
                args = (x + jnp.asarray(self.strength, x.dtype) * self.run(layers, x), *rest)
        return layer(*args, **kwargs)

    def run(self, layers: Sequence[Tree], x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Returns N(x) [B N D]."""
        for weights, activation in zip(layers, self.activations, strict=True):
            weights = {name: value.astype(x.dtype) for name, value in weights.items()}
            if "scale" in weights:
                centred = x - x.mean(-1, keepdims=True)
                x = (
                    centred
                    * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
                    * weights["scale"][None, None]
                )
            else:
                x = jnp.matmul(x, weights["kernel"], precision=precision(x.dtype))
            x = x + weights["bias"][None, None]
            x = ACTIVATIONS[activation](x) if activation else x
        return x


def recognised(keys: Iterable[Any]) -> bool:
    """Returns whether keys are those of a hypernetwork: numbers."""
    return any(type(key) is int for key in keys)


def read(state: Mapping[Any, Any], path: pathlib.Path) -> Hypernetwork:
    """Returns the hook of a file's content, of strength 1.

    Raises ValueError naming a setting that is not A1111's, or layers that are missing, unexpected or misshapen.
    """
    structure = _numbers(state.get("layer_structure") or [1, 2, 1], "layer_structure", path)
    if state.get("dropout_structure") is not None:
        rates = _numbers(state["dropout_structure"], "dropout_structure", path)
        if len(rates) != len(structure):
            raise ValueError(f"{path}: dropout_structure={rates}: expected {len(structure)} numbers")
    activation = state.get("activation_func")
    activation = None if activation in (None, "linear", "Linear") else str(activation).lower()
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{path}: activation_func={activation!r}: expected linear or one of {', '.join(ACTIVATIONS)}")
    if len(structure) < 2 or structure[0] != 1 or structure[-1] != 1:
        raise ValueError(f"{path}: layer_structure={structure}: expected numbers that begin and end with 1")
    rows = _layout(structure, activation, state)
    networks = {}
    for width, pair in state.items():
        if type(width) is int:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(one, dict) for one in pair)):
                raise ValueError(f"{path}: {width}: a pair of networks, for keys and values, is expected")
            named = zip(("to_k", "to_v"), pair, strict=True)
            networks[width] = {name: _layers(one, rows, width, f"{path}: {width} {name}") for name, one in named}
    return Hypernetwork(networks, jnp.float32(1), tuple(row.activation for row in rows))


def _numbers(values, name, path):
    """Returns a list of finite numbers that are not below 0; raises ValueError for another value."""
    right = isinstance(values, list | tuple) and all(type(n) in (int, float) and 0 <= n < WIDEST for n in values)
    if not right:
        raise ValueError(f"{path}: {name}={str(values)[:200]}: expected a list of numbers")
    return list(values)


class Row(NamedTuple):
    """A layer's place in the file's row of modules, its widths as multiples of the context's, and its activation."""

    place: int
    entering: float
    leaving: float
    activation: str | None
    norm: bool = False


def _layout(structure, activation, state):
    """Returns the Rows of a layer_structure; activations, norms and dropouts count as modules of the file."""
    last, rows, place = len(structure) - 2, [], 0
    dropout = _dropout(structure, state)
    for i, (entering, leaving) in enumerate(zip(structure, structure[1:], strict=False)):
        acts = activation if i < last or state.get("activate_output", True) else None
        rows.append(Row(place, entering, leaving, acts))
        place += 2 if acts else 1
        if state.get("is_layer_norm"):
            rows.append(Row(place, leaving, leaving, None, norm=True))
            place += 1
        place += dropout[i + 1] > 0
    return rows


def _dropout(structure, state):
    """Returns the rate of dropout behind each width; older files name only whether there is any."""
    if state.get("dropout_structure") is not None:
        return list(state["dropout_structure"])
    used, last = bool(state.get("use_dropout")), bool(state.get("last_layer_dropout"))
    return [0, *[used] * (len(structure) - 3), used and last, 0][-len(structure) :]


def _layers(weights, rows, width, where):
    """Returns the layers of one network, linear ones as {"kernel" [in out], "bias"}, norms as {"scale", "bias"}."""
    weights = {str(name): value for name, value in weights.items()}
    for old, new in OLD.items():
        weights = {name.replace(old, new) if name.startswith(old) else name: value for name, value in weights.items()}
    wanted = {}
    for row in rows:
        entering, leaving = int(width * row.entering), int(width * row.leaving)
        wanted[f"linear.{row.place}.weight"] = (leaving,) if row.norm else (leaving, entering)
        wanted[f"linear.{row.place}.bias"] = (leaving,)
    there = {name: value.shape for name, value in weights.items() if isinstance(value, np.ndarray)}
    if there != wanted:
        wrong = sorted(str(name) for name in wanted | there if wanted.get(name) != there.get(name))
        raise ValueError(f"{where}: does not fit layer_structure: {trees.listing(wrong)}")

    def layer(row):
        weight, bias = (jnp.asarray(weights[f"linear.{row.place}.{kind}"]) for kind in ("weight", "bias"))
        return {"scale": weight, "bias": bias} if row.norm else {"kernel": weight.T, "bias": bias}

    return [layer(row) for row in rows]
