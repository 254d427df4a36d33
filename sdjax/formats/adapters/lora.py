"""LoRA and its relatives as edits of weights, read from every layout of their files.

    edits = read(tensors, sd, {}, "cat.safetensors")                # {part: {weight's name: Factored}}

methods/deltas defines the effect of factors on a weight.  This module gives factors its names and the scale
a = alpha / r.

Names are never parsed: all spellings of the model's own names are generated and looked up.  PEFT's name of the adapter
between a tensor's role and "weight", as in lora_A.default.weight, is ignored.
Source: the layouts of diffusers, peft, kohya's sd-scripts and LyCORIS.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from sdjax import trees
from sdjax.formats.adapters import lora_pti, peft_settings
from sdjax.formats.adapters.lora_names import spellings
from sdjax.formats.storage import parameters
from sdjax.methods import deltas, edits
from sdjax.methods.edits import Factored
from sdjax.stable_diffusion import StableDiffusion

SUFFIXES = {
    **dict.fromkeys((".lora_down.weight", ".lora.down.weight", ".lora_A.weight"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora.up.weight", ".lora_B.weight"), "up"),
    **dict.fromkeys((".lora_linear_layer.down.weight", ".down.weight"), "down"),
    **dict.fromkeys((".lora_linear_layer.up.weight", ".up.weight"), "up"),
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "magnitude"),
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".diff": "diff",
    ".diff_b": "diff_b",
    **dict.fromkeys(("_custom_diffusion.weight", "_custom_diffusion.0.weight"), "whole"),
    "_custom_diffusion.0.bias": "whole_b",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2")},
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{f".{name}": name for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    **{f".{name}": name for name in ("oft_blocks", "rescale")},
}
# The name up to a tensor's role in PEFT's own state dicts, the adapter's name, and the rest.
NAMED = re.compile(r"(.+\.(?:lora_A|lora_B|lora_magnitude_vector|hada_\w+|lokr_\w+))\.(?!weight$|bias$)([^.]+)(\.\w+)?")
UNSUPPORTED = {  # kind: pattern in a tensor's name
    "BOFT and PEFT's OFT": re.compile(r"\.boft_|\.oft_(?!blocks$)"),
    "IA3": re.compile(r"\.on_input$|\.ia3_l"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "changes of norms": re.compile(r"\.[wb]_norm$"),
    "LoRA with biases": re.compile(r"\.lora_(B|up)\.bias$"),
}


def recognised(names: Iterable[str]) -> bool:
    """Returns whether any of a file's tensors has the name of LoRA or a relative, supported or not."""
    ends = tuple(SUFFIXES)
    return any(_unnamed(name)[0].endswith(ends) or _unsupported(name) or lora_pti.recognised(name) for name in names)


def _unsupported(name):
    """Returns the unsupported kind of a tensor's name, or None."""
    return next((kind for kind, pattern in UNSUPPORTED.items() if pattern.search(name)), None)


def _unnamed(name):
    """Returns (a tensor's name without the adapter's name, the adapter's name or None)."""
    found = NAMED.fullmatch(name)
    return (found[1] + (found[3] or ""), found[2]) if found else (name, None)


def _of_one(tensors, path):
    """Returns {name without the adapter's name: tensor}; raises ValueError for several adapters."""
    adapters = sorted({own for _, own in map(_unnamed, tensors) if own is not None})
    if len(adapters) > 1:
        raise ValueError(f"{path}: holds several adapters, {trees.listing(adapters)}; expected one")
    renamed = {_unnamed(name)[0]: tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError(
            f"{path}: holds tensors with the adapter's name {adapters[0]} and the same without; expected one"
        )
    return renamed


def read(
    tensors: Mapping[str, Any],
    sd: StableDiffusion,
    configs: Mapping[str, dict[str, Any]],
    path: str | pathlib.Path,
) -> dict[str, dict[str, Factored]]:
    """Returns {part: {dotted name of a weight: Factored}} of a file's tensors {name: array}.

    configs: {part: PEFT's settings}, see peft_settings; their alpha is for modules without an alpha of their own.
    Without any alpha it is the rank.
    Raises ValueError naming the file and unsupported kinds, or tensors that fit no weight of this model.
    """
    tensors = _of_one(tensors, path)
    for kind in filter(None, map(_unsupported, tensors)):
        raise ValueError(f"{path}: {kind}: not supported; LoRA, DoRA, LoHa, LoKr, OFT and full differences are")
    parts = {part: network for part, network in sd.networks.items() if part in sd.family.lora}
    places, modules, unknown = spellings(sd.family, FrozenDict(parts)), {}, []
    for name in tensors:
        place, role = _place(name, places)
        if place is None or role in modules.setdefault(place, {}):
            unknown.append(name)
        else:
            modules[place][role] = _array(tensors[name], f"{path}: {name}")
    if unknown:
        raise ValueError(f"{path}: tensors that belong to no weight of this model: {trees.listing(sorted(unknown))}")
    found = {part: {} for part in parts}
    for (part, module), factors in modules.items():
        where, config = f"{path}: {module}", configs.get(part, {})
        for kind in factors.keys() & {"diff_b", "whole_b"}:
            found[part][f"{module}.bias"] = Factored(
                {kind.removesuffix("_b"): factors.pop(kind), "scale": np.float32(1)}
            )
        if factors:
            found[part][f"{module}.kernel"] = Factored(_prepared(factors, module, config, where))
    for part, network in parts.items():
        _check_shapes(found[part], parameters.template(network), path)
    return {part: changes for part, changes in found.items() if changes}


def _place(name, places):
    """Returns ((part, module), role) of a tensor, or (None, None)."""
    for suffix, role in SUFFIXES.items():
        if name.endswith(suffix) and name.removesuffix(suffix) in places:
            return places[name.removesuffix(suffix)], role
    return None, None


def _array(tensor, where):
    """Returns a tensor, float8 as float32; raises ValueError for an empty tensor or another value."""
    if not isinstance(tensor, np.ndarray) or not tensor.size:
        shown = list(tensor.shape) if isinstance(tensor, np.ndarray) else type(tensor).__name__
        raise ValueError(f"{where}: {shown}: expected numbers; a rank is at least 1")
    if tensor.dtype.itemsize > 1 and jnp.issubdtype(tensor.dtype, jnp.floating):
        return tensor
    return tensor.astype(np.float32)  # exact for float8 and for an integer alpha


def _prepared(factors, module, config, where):
    """Returns a module's factors with their scale, and with magnitudes named by their axis ("outputs", "inputs")."""
    shape = {name: value for name, value in factors.items() if name not in ("alpha", "magnitude", "dora_scale")}
    try:
        kind = deltas.of(shape)
    except ValueError:
        said = "these make no LoRA, LoHa, LoKr, OFT or difference"
        raise ValueError(f"{where}: holds {', '.join(sorted(factors))}; {said}") from None
    if config.get("use_dora") and not factors.keys() & {"magnitude", "dora_scale"}:
        raise ValueError(f"{where}: use_dora=True, and the file holds no magnitude")
    flat = [name for name, value in shape.items() if value.ndim < 2]
    if flat:
        raise ValueError(
            f"{where}: {flat[0]} {list(shape[flat[0]].shape)}: expected a matrix or a convolution's kernel"
        )
    if kind.name == "oft":
        return _rotation(factors, shape, where)
    made = {**shape, "scale": np.float32(_scale(factors, kind.ranked, module, config, where))}
    if "alpha" in factors:
        made["alpha"] = factors["alpha"]
    begun = peft_settings.changed(config)
    if begun and set(shape) != {"down", "up"}:
        raise ValueError(f"{where}: init_lora_weights={begun!r}: holds {', '.join(sorted(shape))}, which is no LoRA")
    if begun:
        made[begun] = np.float32(1) if begun == "pissa" else made["scale"]
    if "magnitude" in factors:  # peft: one number per output
        made["outputs"] = factors["magnitude"]
    if "dora_scale" in factors:  # LyCORIS: one per output [out 1 ...], or with wd_on_output=False per input [1 in ...]
        made["inputs" if _by_input(factors["dora_scale"]) else "outputs"] = factors["dora_scale"]
    return made


def _by_input(magnitudes):
    return magnitudes.ndim > 1 and len(magnitudes) == 1


def _rotation(factors, shape, where):
    """Returns the factors of OFT, whose alpha is the constraint of Q per output."""
    blocks = shape["oft_blocks"]
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        raise ValueError(f"{where}: oft_blocks {list(blocks.shape)}: BOFT and other shapes are not supported")
    if factors.keys() & {"dora_scale", "magnitude"}:
        raise ValueError(f"{where}: holds {', '.join(sorted(factors))}; OFT has no magnitudes")
    most = _alpha(factors, where) * blocks.shape[0] * blocks.shape[1] if "alpha" in factors else 0
    return {**shape, "constraint": np.float32(most), **{name: factors[name] for name in ("alpha",) if name in factors}}


def _alpha(factors, where):
    """Returns a module's alpha; raises ValueError if it is not one finite number."""
    if factors["alpha"].size != 1 or not np.isfinite(alpha := float(factors["alpha"].reshape(()))):
        raise ValueError(f"{where}: alpha {factors['alpha'].tolist()}: expected one finite number")
    return alpha


def _scale(factors, ranked, module, config, where):
    """Returns alpha / rank, or alpha / sqrt(rank) for PEFT's rslora; 1 without an alpha or a rank.

    ranked: names of the factors whose first axis is the rank.
    """
    rank = next((len(factors[name]) for name in ranked if name in factors), None)
    rank = peft_settings.rank(config, module, where) if rank is None else rank
    if not rank or factors.keys() & {"diff", "whole"}:
        return 1.0
    if "alpha" not in factors:
        return peft_settings.scale(config, module, rank, where)
    alpha = _alpha(factors, where)
    return alpha / peft_settings.divisor(config, rank) if alpha else 1.0  # sd-scripts writes 0 for "the rank"


def _check_shapes(found, template, path):
    shapes, wrong = trees.flatten(template), []
    for name, edit in found.items():
        if name not in shapes:
            raise ValueError(f"{path}: a difference for {name}, which this model has not")
        try:
            jax.eval_shape(edits.summed, shapes[name], (edit,), (np.float32(1),))
        except (TypeError, ValueError, ZeroDivisionError):
            sizes = ", ".join(f"{key} {list(value.shape)}" for key, value in edit.factors.items() if value.ndim)
            wrong.append(f"{name} ({sizes})")
    if wrong:
        raise ValueError(f"{path}: made for another model; misshapen: {trees.listing(wrong, 3)}")
