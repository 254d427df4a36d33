"""A kind of foreign texts, and what the kinds share: JSON, names of samplers, sizes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdjax.sampling.choices import SAMPLERS

MOST = 1 << 20  # characters of a text; ComfyUI's graphs are long
SAMPLED = {  # samplers of other programs, {their name: ours}
    "euler_ancestral": "euler_a", "dpm_2": "dpm2", "kdpm_2": "dpm2", "dpm_2_ancestral": "dpm2_a", "dpm_2_a": "dpm2_a",
    "kdpm_2_a": "dpm2_a", "dpmpp_2s_ancestral": "dpmpp_2s_a", "uni_pc": "unipc", "uni_pc_bh2": "unipc", "plms": "pndm",
    "dpmsolver++": "dpmpp_2m", "ddim_v3": "ddim",
}  # fmt: skip
SCHEDULED = ("normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform")  # with the same names there


@dataclass(frozen=True)
class Kind:
    """program: its name.  read: returns {setting: value} of a file's texts and name, None if they are not its own."""

    program: str
    read: Callable[[Mapping[str, str], str], dict[str, Any] | None]


def parsed(held: Mapping[str, str], name: str) -> dict[str, Any]:
    """Returns the JSON object in a text, {} if there is none."""
    text = held.get(name, "")
    if not text.lstrip().startswith("{") or len(text) > MOST:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def texts(found: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Returns {setting: value} of entries that are texts or numbers; names: {setting: name of its entry}."""
    said = {setting: found.get(name) for setting, name in names.items()}
    return {setting: value for setting, value in said.items() if isinstance(value, (str, int, float))}


def sized(width: Any, height: Any) -> dict[str, str]:
    """Returns {"size": "WIDTHxHEIGHT"} of two whole numbers, {} of anything else."""
    return {"size": f"{width}x{height}"} if type(width) is int and type(height) is int else {}


def sampled(sampler: Any, schedule: Any = None) -> dict[str, Any]:
    """Returns {"sampler", "schedule"} by our names; an unknown sampler keeps its name."""
    if not isinstance(sampler, str) or not sampler:
        return {}
    name = sampler.lower().removeprefix("k_").removesuffix("_gpu")
    if name.endswith("_k"):  # InvokeAI's and diffusers' names
        name, schedule = name.removesuffix("_k"), "karras"
    ours = SAMPLED.get(name, name)
    found = {"sampler": ours if ours in SAMPLERS else sampler}
    return found | ({"schedule": schedule} if isinstance(schedule, str) and schedule in SCHEDULED else {})
