"""Converts edits of weights to the tensors of a LoRA file, with the names and shapes of a layout.

    tensors = for_kohya(adapter)                        # {"lora_unet_mid_block_..._to_q.lora_down.weight": array, ...}
    with files.new_file(path) as temporary: write(temporary, tensors, {"ss_network_dim": "16"})

Source: sd-scripts' networks/lora.py, LyCORIS, diffusers 0.42 (state_dict_utils.py), peft 0.21.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.formats.storage import files
from sdjax.methods import deltas
from sdjax.methods.adapter import Adapter
from sdjax.methods.deltas.lora import BEGUN
from sdjax.methods.edits import Factored

Array = np.ndarray
Naming = Callable[[str, str, Mapping[str, Any]], dict[str, Array]]
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "outputs": "lora_magnitude_vector"}
SILENT = ("scale", "constraint")  # factors that are not written, since alpha determines them


def whole(adapter: Adapter) -> bool:
    """Returns whether an adapter is edits by factors, perhaps with words, without PiSSA's or OLoRA's start.

    Such files have no name for a replaced weight, or for a bias that changes by more than a difference.
    """
    edits = [pair for edits in adapter.edits.values() for pair in edits.items()]
    plain = all(isinstance(edit, Factored) and _named(name, edit.factors) for name, edit in edits)
    return bool(edits) and plain and not adapter.trees and adapter.hook is None and adapter.model is None


def _named(name, factors):
    """Returns whether files have names for the factors of a weight."""
    bias = name.rpartition(".")[2] == "bias"
    return not factors.keys() & {*BEGUN, "whole"} and (not bias or "diff" in factors)


def modules(adapter: Adapter) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (part, module, factors) of every weight; a bias has the factor "diff_b"."""
    for part, edits in adapter.edits.items():
        for name, edit in edits.items():
            module, _, leaf = name.rpartition(".")
            yield part, module, {"diff_b": edit.factors["diff"]} if leaf == "bias" else dict(edit.factors)


def rank(factors: Mapping[str, Any]) -> int | None:
    """Returns the rank of factors, or None for kinds without a rank."""
    names = {name for name in factors if name not in SILENT}
    return next((len(factors[name]) for name in deltas.of(names).ranked if name in factors), None)


def alpha(factors: Mapping[str, Any]) -> np.ndarray:
    """Returns the file's alpha, or else scale times rank, float32 []."""
    if "alpha" in factors:
        return np.asarray(factors["alpha"]).reshape(())
    return np.asarray(float(factors["scale"]) * (rank(factors) or 1), np.float32)


def kohya(
    prefixes: Mapping[str, Sequence[str]], part: str, module: str, factors: Mapping[str, Any]
) -> dict[str, Array]:
    """Returns the tensors of one weight with sd-scripts' and LyCORIS' names, and alpha.

    prefixes: {part: prefixes of its layers}, a family's `lora`.
    """
    if "diff_b" in factors:
        found = {"diff_b": factors["diff_b"]}
    else:
        found = {KOHYA.get(role, role): np.asarray(x) for role, x in factors.items() if role not in (*SILENT, "alpha")}
        for role in {"outputs", "inputs"} & factors.keys():
            del found[role]
            found["dora_scale"] = _by_axis(role, factors)
        if "diff" not in factors:
            found["alpha"] = alpha(factors)
    return {f"{prefixes[part][0]}_{module.replace('.', '_')}.{suffix}": x for suffix, x in found.items()}


def _by_axis(role, factors):
    """Returns DoRA's magnitudes in LyCORIS' shape, [out 1 ...] or [1 in ...]."""
    held = np.asarray(factors[role])
    axes = max(held.ndim, factors["down"].ndim if "down" in factors else 2)
    count = [1] * axes
    count[0 if role == "outputs" else 1] = held.size
    return held.reshape(count)


def for_kohya(adapter: Adapter) -> dict[str, Array]:
    """Returns {name: array} of all edits of an adapter with sd-scripts' and LyCORIS' names."""
    return named(adapter, functools.partial(kohya, adapter.family.lora))


ATTENTION = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)$|\.self_attn\.(q|k|v|out)_proj$")


def diffusers(part: str, module: str, factors: Mapping[str, Any], old: bool) -> dict[str, Array]:
    """Returns the tensors of one weight of LoRA or DoRA with the names of diffusers' save_lora_weights.

    old: "lora.down" instead of "lora_A", diffusers' names for attention; its loader needs one style per part.
    A text encoder's magnitudes end in ".weight"; transformers 5 ignores them otherwise.
    """
    text, found = part.startswith("text_encoder"), {}
    names = ("lora_linear_layer.down", "lora_linear_layer.up") if text else ("lora.down", "lora.up")
    for role, x in _of_peft(factors).items():
        suffix = role.replace("lora_A", names[0]).replace("lora_B", names[1]) if old else role
        suffix += ".weight" if text and role == PEFT["outputs"] else ""
        found[f"{part}.{module}.{suffix}"] = x
    return found


def for_diffusers(adapter: Adapter) -> dict[str, Array]:
    """Returns {name: array} of all edits of an adapter with diffusers' names."""
    found = {}
    for part in adapter.edits:
        own = [(module, factors) for of, module, factors in modules(adapter) if of == part]
        old = all(ATTENTION.search(module) for module, _ in own)
        for module, factors in own:
            found |= diffusers(part, module, factors, old)
    return found


def peft(part: str, module: str, factors: Mapping[str, Any]) -> dict[str, Array]:
    """Returns the tensors of one weight of LoRA, DoRA or LoHa with the names of PEFT's save_pretrained.

    A text encoder's layers have the names of transformers 5.6 and later.
    """
    stem = f"base_model.model.{module.removeprefix('text_model.')}"
    return {f"{stem}.{suffix}": x for suffix, x in _of_peft(factors).items()}


def _of_peft(factors):
    """Returns {PEFT's name of a factor: array}."""
    found = {PEFT.get(role, role): np.asarray(x) for role, x in factors.items() if role not in (*SILENT, "alpha")}
    if "outputs" in factors:
        count = (-1,) if factors["down"].ndim == 2 else (1, -1, 1, 1)
        found[PEFT["outputs"]] = found[PEFT["outputs"]].reshape(count)
    return found


def named(adapter: Adapter, naming: Naming) -> dict[str, Array]:
    """Returns {name: array} of all edits of an adapter."""
    found = {}
    for part, module, factors in modules(adapter):
        found |= naming(part, module, factors)
    return found


def told(adapter: Adapter) -> dict[str, str]:
    """Returns the method that trained an adapter and its settings, as metadata."""
    about = {name: x for name, x in adapter.about.items() if name in ("method", "settings") and x}
    return {name: x if type(x) is str else json.dumps(x) for name, x in about.items()}


def write(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Path:
    """Writes tensors as safetensors, completely or not at all, and returns the path."""
    held = {name: files.Tensor(x.shape, x.dtype.name, lambda x=x: x) for name, x in tensors.items()}
    with files.new_file(path) as temporary:
        files.write_safetensors(temporary, held, {"format": "pt", **metadata})
    return path
