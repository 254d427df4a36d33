"""A1111's hypernetwork files: reads one as a hook, and converts a hook to the content of a file.

    hook, about = read(pickles.read("style.pt"), path)
    pickle_writer.write(path, content(hook, about))

A file is a dict with a pair of state dicts for every width, and settings.  sdjax/models/hypernetworks.py has the
formula.  Source: AUTOMATIC1111's stable-diffusion-webui.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.models import hypernetworks
from sdjax.models.hypernetworks import ACTIVATIONS, PROJECTIONS, Hypernetwork

OLD = {"linear1.": "linear.0.", "linear2.": "linear.1."}
WIDEST = 2**20  # limit of a layer's width, as a multiple of the context's width
RATE = 0.3  # dropout rate of files that give only its places
KEPT = ("step", "name", "weight_initialization", "sd_checkpoint", "sd_checkpoint_name", "optional_info")


def recognised(keys: Iterable[Any]) -> bool:
    """Returns whether a key is an integer, as in a hypernetwork's file."""
    return any(type(key) is int for key in keys)


def read(state: Mapping[Any, Any], path: pathlib.Path) -> tuple[Hypernetwork, dict[str, Any]]:
    """Returns (the hook in a file's content, with strength 1, and {name: value} of its metadata).

    Raises ValueError naming an unknown setting, or layers that are missing, unexpected or misshapen.
    """
    structure = _numbers(state.get("layer_structure") or [1, 2, 1], "layer_structure", path)
    activation = state.get("activation_func")
    activation = None if activation in (None, "linear", "Linear") else str(activation).lower()
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{path}: activation_func={activation!r}: expected linear or one of {', '.join(ACTIVATIONS)}")
    if len(structure) < 2 or structure[0] != 1 or structure[-1] != 1:
        raise ValueError(f"{path}: layer_structure={structure}: expected numbers that begin and end with 1")
    norm, output = bool(state.get("is_layer_norm")), bool(state.get("activate_output", True))
    rows = hypernetworks.layout(structure, activation, norm, output, _dropout(structure, state, path))
    networks = {}
    for width, pair in state.items():
        if type(width) is int:
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(one, dict) for one in pair)):
                raise ValueError(f"{path}: {width}: a pair of networks, for keys and values, is expected")
            named = zip(PROJECTIONS, pair, strict=True)
            networks[str(width)] = {name: _layers(one, rows, width, f"{path}: {width} {name}") for name, one in named}
    about = {name: state[name] for name in KEPT if isinstance(state.get(name), str | int)}
    return Hypernetwork(networks, jnp.float32(1), rows=rows), about


def content(hook: Hypernetwork, about: Mapping[str, Any]) -> dict[Any, Any]:
    """Returns A1111's content of a hypernetwork's file: {width: (state dict for keys, for values), setting: value}.

    about: "name", "step", "weight_initialization" and so on; missing ones are None, 0 or A1111's default.
    """

    def state(layers):
        found = {}
        for row in hook.rows:
            weights = layers[str(row.place)]
            weight = weights["scale"] if row.norm else np.asarray(weights["kernel"]).T
            found[f"linear.{row.place}.weight"], found[f"linear.{row.place}.bias"] = weight, weights["bias"]
        return {name: np.ascontiguousarray(value) for name, value in found.items()}

    pairs = {int(width): tuple(state(pair[name]) for name in PROJECTIONS) for width, pair in hook.networks.items()}
    return {**pairs, **settings(hook), "step": 0, "name": "", "weight_initialization": "Normal", "sd_checkpoint": None,
            "sd_checkpoint_name": None, **about}  # fmt: skip


def settings(hook: Hypernetwork) -> dict[str, Any]:
    """Returns A1111's settings that determine a hook's layers."""
    linear = [row for row in hook.rows if not row.norm]
    rates = [0.0] * len(linear)
    for row in hook.rows:
        rates[sum(one.place <= row.place for one in linear) - 1] += row.dropout
    activation = next((row.activation for row in linear if row.activation), None)
    return {
        "layer_structure": [1, *(row.leaving for row in linear)],
        "activation_func": activation or "linear",
        "is_layer_norm": any(row.norm for row in hook.rows),
        "activate_output": bool(linear[-1].activation),
        "use_dropout": any(rates),
        "dropout_structure": [0, *rates] if any(rates) else None,
        "last_layer_dropout": len(rates) > 1 and rates[-2] > 0,
    }


def _numbers(values, name, path):
    """Returns a list of numbers from 0 to below WIDEST; raises ValueError for another value."""
    right = isinstance(values, list | tuple) and all(type(n) in (int, float) and 0 <= n < WIDEST for n in values)
    if not right:
        raise ValueError(f"{path}: {name}={str(values)[:200]}: expected a list of numbers")
    return list(values)


def _dropout(structure, state, path):
    """Returns the dropout rate after each width; older files tell only whether there is dropout."""
    if state.get("dropout_structure") is not None:
        rates = _numbers(state["dropout_structure"], "dropout_structure", path)
        if len(rates) != len(structure):
            raise ValueError(f"{path}: dropout_structure={rates}: expected {len(structure)} numbers")
        return rates
    used, last = RATE * bool(state.get("use_dropout")), bool(state.get("last_layer_dropout"))
    return [0, *[used] * (len(structure) - 3), used * last, 0][-len(structure) :]


def _layers(weights, rows, width, where):
    """Returns {place: weights} of one network: "kernel" [in out] for linear layers, "scale" for norms, and "bias"."""
    weights = {str(name): value for name, value in weights.items()}
    for old, new in OLD.items():
        weights = {name.replace(old, new) if name.startswith(old) else name: value for name, value in weights.items()}
    wanted = {}
    for row in rows:
        shape, bias = hypernetworks.shapes(row, width).values()
        wanted |= {f"linear.{row.place}.weight": shape[::-1], f"linear.{row.place}.bias": bias}
    there = {name: value.shape for name, value in weights.items() if isinstance(value, np.ndarray)}
    if there != wanted:
        wrong = sorted(str(name) for name in wanted | there if wanted.get(name) != there.get(name))
        raise ValueError(f"{where}: does not fit layer_structure: {trees.listing(wrong)}")

    def layer(row):
        weight, bias = (jnp.asarray(weights[f"linear.{row.place}.{kind}"]) for kind in ("weight", "bias"))
        return {"scale": weight, "bias": bias} if row.norm else {"kernel": weight.T, "bias": bias}

    return {str(row.place): layer(row) for row in rows}
