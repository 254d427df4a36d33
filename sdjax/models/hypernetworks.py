"""A1111's hypernetworks as a hook: small networks on the input of attention's keys and values.

    k = to_k(x + s N_k(x))    v = to_v(x + s N_v(x))    q unchanged

x is the context of an attention layer, or the input of self-attention.  Every width of x has its own pair (N_k, N_v),
shared by all layers of that width.  N is a sequence of linear layers; depending on the settings, an activation, a layer
norm and dropout follow each.
Source: the formula and the settings of AUTOMATIC1111's stable-diffusion-webui.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from sdjax import trees
from sdjax.models.kernels.precision import precision
from sdjax.models.layers import gelu
from sdjax.trees import Tree

# torch's activations by their lower-case names, with torch's default settings; swish is A1111's name for hardswish.
# A1111 offers more, without use here: softmax, softmin and logsoftmax act over the batch, since it names no axis, so a
# picture would depend on the others; glu halves the width; prelu has a weight that A1111 never trains; threshold and
# multiheadattention need arguments.
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leakyrelu": jax.nn.leaky_relu,
    "rrelu": lambda x: jax.nn.leaky_relu(x, (1 / 8 + 1 / 3) / 2),  # the mean of its random slopes, as in torch's eval()
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
PROJECTIONS = ("to_k", "to_v")
EPSILON = 1e-5  # torch's LayerNorm


class Row(NamedTuple):
    """A layer with weights.

    place: its number among a file's modules.  entering, leaving: its widths, as multiples of the context's.
    activation: None for linear.  norm: whether it is a layer norm.  dropout: the rate after it.
    """

    place: int
    entering: float
    leaving: float
    activation: str | None = None
    norm: bool = False
    dropout: float = 0.0


def layout(
    structure: Sequence[float], activation: str | None, norm: bool, activate_output: bool, dropout: Sequence[float]
) -> tuple[Row, ...]:
    """Returns the Rows of a layer_structure; activations, norms and dropouts count as modules of a file.

    structure: widths as multiples of the context's; the first and the last are 1.  activation: None for linear.
    dropout: the rate after each width of the structure.
    """
    last, rows, place = len(structure) - 2, [], 0
    for i, (entering, leaving) in enumerate(zip(structure, structure[1:], strict=False)):
        acts = activation if i < last or activate_output else None
        rows.append(Row(place, entering, leaving, acts))
        place += 2 if acts else 1
        if norm:
            rows.append(Row(place, leaving, leaving, norm=True))
            place += 1
        if dropout[i + 1] > 0:
            rows[-1] = rows[-1]._replace(dropout=float(dropout[i + 1]))
            place += 1
    return tuple(rows)


def shapes(row: Row, width: int) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of a row's weights for a context of this width: "kernel" (a norm's "scale") and "bias"."""
    entering, leaving = int(width * row.entering), int(width * row.leaving)
    return (
        {"scale": (leaving,), "bias": (leaving,)} if row.norm else {"kernel": (entering, leaving), "bias": (leaving,)}
    )


class Hypernetwork(struct.PyTreeNode):
    """The hook.

    networks: {width: {"to_k" | "to_v": {place: {"kernel" [in out] or "scale", "bias"}}}}, with names as text.
    strength: s, an array.  rows: the layers, the same in all networks.
    keys [B]: for dropout in training, one per example; each layer derives its own key.  None for no dropout.
    """

    networks: Any
    strength: Any
    keys: Any = None
    rows: tuple[Row, ...] = struct.field(pytree_node=False, default=())

    def intercept(self, part: str, layer: Callable, args: tuple, kwargs: dict[str, Any], at: Any, cond: Any) -> Any:
        if part == "unet" and at.module.name in PROJECTIONS and at.method_name == "__call__":
            x, *rest = args
            if str(x.shape[-1]) in self.networks:
                layers, keys = self.networks[str(x.shape[-1])][at.module.name], None
                if self.keys is not None:
                    name = "/".join(at.module.path)
                    keys = jax.vmap(lambda key: trees.named_key(key, name))(self.keys)
                args = (x + jnp.asarray(self.strength, x.dtype) * self.run(layers, x, keys), *rest)
        return layer(*args, **kwargs)

    def run(self, layers: Mapping[str, Tree], x: Float[Array, "B N D"], keys: Any = None) -> Float[Array, "B N D"]:
        """Returns N(x) [B N D].  keys [B]: for dropout, or None."""
        for row in self.rows:
            x = _layer(row, {name: value.astype(x.dtype) for name, value in layers[str(row.place)].items()}, x)
            if row.dropout and keys is not None:
                x = _dropped(x, row, keys)
        return x


def _layer(row, weights, x):
    """Returns one row's output [B N out] for x [B N in]."""
    if row.norm:
        centred = x - x.mean(-1, keepdims=True)
        x = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * weights["scale"][None, None]
    else:
        x = jnp.matmul(x, weights["kernel"], precision=precision(x.dtype))
    x = x + weights["bias"][None, None]
    return ACTIVATIONS[row.activation](x) if row.activation else x


def _dropped(x, row, keys):
    """Returns x [B N D] with a share of its numbers set to 0 and the others scaled up, so that the mean stays."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, row.place), 1 - row.dropout, x.shape[1:]))
    return jnp.where(kept(keys), x / (1 - row.dropout), jnp.zeros_like(x))
