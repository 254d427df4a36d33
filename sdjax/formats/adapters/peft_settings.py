"""PEFT's settings of an adapter: where files keep them, which are read, and the scale that they give a module.

    settings = of_file(path, names, metadata)                # {"unet": {"r": 4, "lora_alpha": 16, ...}, ...}
    scale(settings["unet"], "mid_block.attentions.0.proj_in", 4, path)       # 4.0

Kept, in this order: as JSON in a safetensors header under lora_adapter_metadata, with the part's name in front
("unet.r", of a pipeline) or without ("r", of `unet.save_lora_adapter`); as keys of the header themselves; in the
adapter_config.json beside PEFT's files.
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
PLAIN = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # of init_lora_weights: the base stays as it is
CHANGED = ("pissa", "olora")  # they took B0 A0 out of the base; of the others' it cannot be known
NUMBERS, PATTERNS = ("r", "lora_alpha", "alpha"), ("rank_pattern", "alpha_pattern")
APPLIED = (*NUMBERS, *PATTERNS, "use_rslora", "use_dora", "init_lora_weights", "peft_type")
# Of training, or told by the tensors too: modules, biases, layers that were saved whole.
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("bias", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_bias", "modules_to_save"),
    *("target_modules", "trainable_token_indices", "fan_in_fan_out", "ensure_weight_tying", "runtime_config"),
    *("lora_dropout", "module_dropout", "rank_dropout", "rank_dropout_scale", "megatron_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "init_weights"),
    *("decompose_both", "decompose_factor", "use_effective_conv2d"),
)


def of_file(path: pathlib.Path, names: Iterable[str], metadata: dict[str, str]) -> dict[str, dict]:
    """Returns {part: PEFT's settings} of a file with tensors of these names, empty where nothing tells any.

    Raises ValueError naming the file and the setting that is not supported, or whose value cannot be.
    """
    found = kept(pathlib.Path(path), names, metadata)
    settings, shared = {}, {name: value for name, value in found.items() if "." not in name}
    for part in PARTS:
        own = {name.removeprefix(f"{part}."): value for name, value in found.items() if name.startswith(f"{part}.")}
        settings[part] = {**shared, **own}
        _check(settings[part], path)
    return settings


def kept(path: pathlib.Path, names: Iterable[str], metadata: dict[str, str]) -> dict[str, Any]:
    """Returns the settings as the file has them, {"unet.r": 4, ...} or {"r": 4, ...}; {} where it has none.

    Raises ValueError naming the file where they cannot be read.
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
    """Returns the value of a header's text, JSON or Python's; other text is itself."""
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
    """Returns "pissa" or "olora" where the first B0 A0 of training was taken out of the base, else None."""
    first = _lower(settings.get("init_lora_weights"))
    return first if first in CHANGED else None


def rank(settings: dict, module: str, path: pathlib.Path) -> float | None:
    """Returns the rank that the settings give a module, None where they tell none."""
    return _of_module(settings, "rank_pattern", module, path, settings.get("r"))


def scale(settings: dict, module: str, rank: float, path: pathlib.Path) -> float:
    """Returns alpha / rank, with rslora alpha / sqrt(rank), of a module; 1 where the settings have no alpha."""
    usual = settings.get("lora_alpha", settings.get("alpha"))
    alpha = _of_module(settings, "alpha_pattern", module, path, usual)
    return 1.0 if alpha is None else alpha / divisor(settings, rank)


def divisor(settings: dict, rank: float) -> float:
    """Returns what alpha is divided by: the rank, with rslora its root."""
    return rank**0.5 if settings.get("use_rslora") else rank


def _of_module(settings, pattern, module, path, usual):
    """Returns the value of the first key of a pattern that names a module, else the usual one.

    A key names a module by its last names, or after ^ by the whole of it.
    """
    ends = (module, module.removeprefix("text_model."))
    for key, value in (settings.get(pattern) or {}).items():
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise ValueError(f"{path}: {pattern}: {key!r}: expected a module's name or its end, not another pattern")
        if key[1:] in ends if key[0] == "^" else f".{module}".endswith(f".{key}"):
            return value
    return usual
