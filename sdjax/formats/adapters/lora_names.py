"""Names of layers in LoRA files: all known spellings, generated from the model's own names and never parsed."""

import functools
from typing import Any

from flax.core import FrozenDict

from sdjax import trees
from sdjax.families.family import Family
from sdjax.formats.storage import ldm_names, parameters
from sdjax.formats.storage.parameters import Network


@functools.lru_cache(maxsize=4)
def spellings(family: Family, networks: FrozenDict[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns {spelling of a module's name: (part, module)} for all layers with a kernel.

    networks: {part: network} of the parts in the family's `lora`.  Spellings that fit several parts, such as two text
    encoders, are left out.
    """
    found: dict[str, tuple[str, str]] = {}
    shared: set[str] = set()
    for part in networks:
        network: Any = networks[part]
        original = ldm_names.unet_modules(network.config) if part == "unet" else {}
        for module in modules(network):
            if part == "unet":
                spelled = set(_unet_spellings(module, ldm_names.rename(module, original)))
            else:
                spelled = set(_text_spellings(module, part, family))
            shared |= spelled & found.keys()
            found |= dict.fromkeys(spelled, (part, module))
    return {name: place for name, place in found.items() if name not in shared}


def modules(network: Network) -> list[str]:
    """Returns the dotted names of the layers that have a kernel."""
    leaves = (name.rpartition(".") for name in trees.names(parameters.template(network)))
    return [module for module, _, leaf in leaves if leaf == "kernel"]


def _unet_spellings(module, original):
    """Yields all spellings of a module.  original: its name in the original code, which sd-scripts and ComfyUI use."""
    yield from (module, f"unet.{module}", f"base_model.model.{module}", f"diffusion_model.{original}")
    yield from (f"lora_unet_{name.replace('.', '_')}" for name in (module, original))
    yield f"lycoris_{module.replace('.', '_')}"
    attention, _, projection = module.removesuffix(".0").rpartition(".")
    if projection in ("to_q", "to_k", "to_v", "to_out"):  # with and without the part's name
        for part in ("", "unet."):
            processor = f"{part}{attention}.processor.{projection}"
            yield from (f"{processor}_lora", processor)  # diffusers before 0.20, Custom Diffusion


def _text_spellings(module, part, family):
    for name in (module, module.removeprefix("text_model.")):
        flat = name.replace(".", "_")
        yield from (name, f"{part}.{name}", f"base_model.model.{name}", f"lycoris_{flat}")
        yield from (f"{prefix}_{flat}" for prefix in family.lora[part])
        yield f"text_encoders.{family.rows[part]}.transformer.{name}"  # ComfyUI
        attention, _, projection = name.removesuffix("_proj").rpartition(".")
        if name.endswith("_proj"):  # diffusers before 0.20
            yield f"{part}.{attention}.to_{projection}_lora"
