"""PEFT's settings of an adapter: reads them from a file, checks them, and computes a module's rank and scale.

    settings = of_file(path, names, metadata)                # {"unet": {"r": 4, "lora_alpha": 16, ...}, ...}
    scale(settings["unet"], "mid_block.attentions.0.proj_in", 4, path)       # 4.0

The first of these places counts:
* JSON in a safetensors header under lora_adapter_metadata, with the part's name ("unet.r", from a pipeline) or without
  ("r", from `unet.save_lora_adapter`);
* keys of the header itself;
* adapter_config.json next to PEFT's files.
Source: diffusers 0.42, loaders/peft.py and lora_base.py; peft 0.21, tuners/lora.
"""

import ast
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from sdjax.formats.storage import files

METADATA, CONFIG = "lora_adapter_metadata", "adapter_config.json"
PARTS = ("unet", "text_encoder", "text_encoder_2")
KINDS = ("LORA", "LOHA", "LOKR")
PLAIN = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # init_lora_weights that keep the base's weights
CHANGED = ("pissa", "olora")  # init_lora_weights that subtract a known B0 A0 from the base's weights
NUMBERS, PATTERNS = ("r", "lora_alpha", "alpha"), ("rank_pattern", "alpha_pattern")
APPLIED = (*NUMBERS, *PATTERNS, "use_rslora", "use_dora", "init_lora_weights", "peft_type")
# Settings for training only, or that the tensors also show: modules, biases, fully saved layers.
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("bias", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_bias", "modules_to_save"),
    *("target_modules", "trainable_token_indices", "fan_in_fan_out", "ensure_weight_tying", "runtime_config"),
    *("lora_dropout", "module_dropout", "rank_dropout", "rank_dropout_scale", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "init_weights"),
    *("decompose_both", "decompose_factor", "use_effective_conv2d"),
)


def of_file(path: pathlib.Path, names: Iterable[str], metadata: dict[str, str]) -> dict[str, dict]:
    """Returns {part: PEFT's settings} of a file with tensors of these names; parts without settings have {}.

    Raises ValueError naming the file and an unsupported setting or an impossible value.
    """
    found = kept(pathlib.Path(path), names, metadata)
    settings, shared = {}, {name: value for name, value in found.items() if "." not in name}
    for part in PARTS:
        own = {name.removeprefix(f"{part}."): value for name, value in found.items() if name.startswith(f"{part}.")}
        settings[part] = {**shared, **own}
        _check(settings[part], path)
    return settings


def kept(path: pathlib.Path, names: Iterable[str], metadata: dict[str, str]) -> dict[str, Any]:
    """Returns a file's settings, {"unet.r": 4, ...} or {"r": 4, ...}; {} without settings.

    Raises ValueError naming the file if they cannot be read.
    """
    if METADATA in metadata:
        try:
            found = json.loads(metadata[METADATA])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {METADATA} is no JSON: {error}") from None
        if type(found) is not dict:
            raise ValueError(f"{path}: {METADATA}: expected an object of settings")
        return found
    header = {key: _value(text) for key, text in metadata.items() if key.rpartition(".")[2] in APPLIED}
    if header:
        return header
    beside = path.parent / CONFIG
    if any(name.startswith("base_model.model.") for name in names) or path.stem == "adapter_model" and beside.is_file():
        return files.read_json(beside)
    return {}


def _value(text):
    """Returns the value of a header's text as JSON or Python; other text stays text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return text


def _check(settings, path):
    def refuse(name, expected):
        raise ValueError(f"{path}: {name}={settings[name]!r}: {expected}")

    for name, value in settings.items():
        if name not in APPLIED + WITHOUT_EFFECT and value:
            refuse(name, "a setting of PEFT's that is not supported")
        if name in NUMBERS and value is not None and not (_finite(value) and (name != "r" or value > 0)):
            refuse(name, "expected a number of at least 1" if name == "r" else "expected a number")
        if name in PATTERNS and value and not (type(value) is dict and all(map(_finite, value.values()))):
            refuse(name, "expected a number for each name")
        if name in ("use_rslora", "use_dora") and value not in (None, True, False):
            refuse(name, "expected true or false")
    first, kind = settings.get("init_lora_weights"), settings.get("peft_type")
    if kind is not None and kind not in KINDS:
        refuse("peft_type", f"not supported; {', '.join(KINDS)} are")
    if _lower(first) not in (*PLAIN, *CHANGED):
        refuse("init_lora_weights", f"not supported; {', '.join(CHANGED)}, eva and what leaves the base as it is are")


def _lower(value):
    return value.lower() if isinstance(value, str) else value


def _finite(value):
    return type(value) in (int, float) and math.isfinite(value)


def changed(settings: dict) -> str | None:
    """Returns "pissa" or "olora" if training subtracted the initial B0 A0 from the base's weights, else None."""
    first = _lower(settings.get("init_lora_weights"))
    return first if first in CHANGED else None


def rank(settings: dict, module: str, path: pathlib.Path) -> float | None:
    """Returns a module's rank by the settings, or None."""
    return _of_module(settings, "rank_pattern", module, path, settings.get("r"))


def scale(settings: dict, module: str, rank: float, path: pathlib.Path) -> float:
    """Returns a module's scale: alpha / rank, alpha / sqrt(rank) for rslora, or 1 without an alpha in the settings."""
    usual = settings.get("lora_alpha", settings.get("alpha"))
    alpha = _of_module(settings, "alpha_pattern", module, path, usual)
    return 1.0 if alpha is None else alpha / divisor(settings, rank)


def divisor(settings: dict, rank: float) -> float:
    """Returns the divisor of alpha: the rank, or its square root for rslora."""
    return rank**0.5 if settings.get("use_rslora") else rank


def _of_module(settings, pattern, module, path, usual):
    """Returns the value of the first key in a pattern setting that matches a module, else the usual value.

    A key matches the end of a module's name, or with ^ the full name.
    """
    ends = (module, module.removeprefix("text_model."))
    for key, value in (settings.get(pattern) or {}).items():
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise ValueError(f"{path}: {pattern}: {key!r}: expected a module's name or its end, not another pattern")
        if key[1:] in ends if key[0] == "^" else f".{module}".endswith(f".{key}"):
            return value
    return usual
