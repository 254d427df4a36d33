"""cloneofsimo's LoRA, whose tensors have numbers instead of names: unet:0:up, unet:0:down, text_encoder:0:up, ...

    tensors, words = named(file.content, file.metadata, sd, path)     # names as diffusers writes them; words' rows

The number is the place in a walk through PyTorch's modules: all linear layers inside those of some classes, which the
metadata lists per part.  There is no alpha.  A learned token has its own name, and "<embed>" in the metadata.
Source: cloneofsimo/lora, lora_diffusion/lora.py (save_safeloras); diffusers 0.9 to 0.39 and transformers for the order.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax import trees
from sdjax.formats.adapters.lora_names import modules
from sdjax.stable_diffusion import StableDiffusion

NUMBERED = re.compile(r"(\w+):(\d+):(up|down)")
WORD = "<embed>"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")  # as transformers' CLIPAttention declares them
BLOCK = re.compile(
    r"(down_blocks|up_blocks|mid_block)\.(.*transformer_blocks\.\d+)\.(?:(attn1|attn2)\.(.+)|(ff)\.net\.0\.proj)"
)
SECTIONS = ("down_blocks", "up_blocks", "mid_block")  # diffusers' UNet declares its middle last
ORDERS = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))  # of a transformer block, in old and new diffusers
CLASSES = {"CrossAttention": ("attn1", "attn2"), "Attention": ("attn1", "attn2"), "GEGLU": ("ff",)}


def recognised(name: str) -> bool:
    """Returns whether a tensor's name has a number."""
    return NUMBERED.fullmatch(name) is not None


def named(
    tensors: Mapping[str, Any], metadata: Mapping[str, str], sd: StableDiffusion, path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns ({tensor's name in diffusers: tensor}, {word: rows}) of a file; other tensors keep their names.

    Raises ValueError naming the file if it lists other classes than those of the usual training, or does not fit.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not recognised(name)}
    words = {name: kept.pop(name) for name in list(kept) if metadata.get(name) == WORD}
    parts: dict[str, dict[tuple[int, str], Any]] = {}
    for name, tensor in tensors.items():
        if found := NUMBERED.fullmatch(name):
            parts.setdefault(found[1], {})[int(found[2]), found[3]] = tensor
    for part, held in parts.items():
        if part not in sd.family.lora or part not in sd.networks:
            raise ValueError(f"{path}: tensors {part}:0:up ...; the model has {', '.join(sd.networks)}")
        count = len(held) // 2
        walks = _walks(part, sd, _classes(part, metadata, path))
        if len(walks[0]) != count or held.keys() != {(i, side) for i in range(count) for side in ("up", "down")}:
            raise ValueError(f"{path}: {len(held)} tensors of {part}; expected 2 for each of {len(walks[0])} layers")
        walk = next((walk for walk in walks if _fits(walk, held, sd, part)), walks[0])
        for i, module in enumerate(walk):
            kept[f"{part}.{module}.lora_A.weight"] = held[i, "down"]
            kept[f"{part}.{module}.lora_B.weight"] = held[i, "up"]
    return kept, words


def _classes(part, metadata, path):
    """Returns the classes whose layers were trained."""
    try:
        found = json.loads(metadata.get(part, "null"))
    except (ValueError, RecursionError):
        found = None
    able = ("CLIPAttention",) if part != "unet" else tuple(CLASSES)
    if not isinstance(found, list) or not found or not set(map(str, found)) <= set(able):
        shown = f"lists {trees.listing(map(str, found))}" if isinstance(found, list) else "has no list"
        raise ValueError(f"{path}: LoRA by position: the metadata {part!r} {shown}; expected {', '.join(able)}")
    return found


def _walks(part, sd, classes):
    """Returns the possible orders of a part's trained layers."""
    names = modules(sd.networks[part])
    if part != "unet":
        layers = sorted((name for name in names if ".self_attn." in name), key=_text_place)
        return [layers]
    inside = {role for one in classes for role in CLASSES[one]}
    found = [(match, name) for name in names if (match := BLOCK.fullmatch(name)) and (match[3] or match[5]) in inside]
    return [[name for _, name in sorted(found, key=lambda item: _place(item[0], order))] for order in ORDERS]


def _place(match, order):
    """Returns the place of a layer in a UNet's walk."""
    numbers = [int(number) for number in re.findall(r"\d+", match[2])]
    inner = ATTENTION.index(match[4]) if match[4] else 0
    return SECTIONS.index(match[1]), numbers, order.index(match[3] or match[5]), inner


def _text_place(name):
    """Returns the place of a layer in a text encoder's walk."""
    return int(re.findall(r"\d+", name)[0]), TEXT.index(name.rpartition(".")[2])


def _fits(walk, held, sd, part):
    """Returns whether the factors have the sizes of the layers."""
    kernels = trees.flatten(sd.parts[part])
    sides = ((held[i, "down"].shape[-1], len(held[i, "up"])) for i in range(len(walk)))
    shapes = (kernels[f"{module}.kernel"].shape for module in walk)
    return all((shape[-2], shape[-1]) == side for shape, side in zip(shapes, sides, strict=True))
