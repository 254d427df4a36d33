"""Reports an adapter file's kind, base model and faults.

lines, wrong = report("cat.safetensors")        # ["cat.safetensors: lora", "base: SD 1.5", ...], ["3 tensors ..."]
"""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.formats import pipeline
from sdjax.formats.adapters import about, adapter_file, attachable, embeddings, kinds
from sdjax.formats.storage.hashes import autov2, autov3
from sdjax.methods.adapter import Adapter
from sdjax.stable_diffusion import StableDiffusion

SHAPES = {"sd15": "Stable Diffusion 1", "sd21": "Stable Diffusion 2"}
TOLD = {"ss_base_model_version": "trained on", "ss_sd_model_name": "base", about.TRIGGER: "say", "ss_steps": "steps"}


def bases(model: str | None = None) -> Iterator[StableDiffusion]:
    """Yields the base models to try: the given one, otherwise built-in shapes without weights, then pocket."""
    if model is not None:
        yield pipeline.load(model)
        return
    for name in SHAPES:
        yield pipeline.shape(name)
    yield pipeline.load("pocket")


def report(source: str | Path, model: str | None = None) -> tuple[list[str], list[str]]:
    """Returns (lines that describe a file, lines with its faults).

    Raises ValueError for a damaged file, or one that is not an adapter.
    """
    path = attachable.given(source)
    file = adapter_file.of(path)
    kind = kinds.kind_of(file)
    if path.is_dir():
        raise ValueError(f"{source}: a folder of the format {kind.called}; expected a file")
    lines, wrong = [f"{source}: {kind.called or kind.name}"], _broken(file.content)
    lines += [f"{word} {file.metadata[name]}" for name, word in TOLD.items() if file.metadata.get(name)]
    lines.append(f"AutoV2 {autov2(path)}, AutoV3 {autov3(path)}")
    if (said := file.metadata.get("sshs_model_hash")) and said[:12] != autov3(path):
        wrong.append(f"the AutoV3 hash in the header is {said[:12]}: the tensors have changed since it was written")
    adapter, base, trouble = _read(path, kind, model)
    if adapter is None:
        return lines, [*wrong, *trouble]
    lines.append(f"fits {base}")
    if adapter.edits:
        lines.append(f"{counted(adapter)}{f'; rank {ranks(adapter)}' if ranks(adapter) else ''}")
    lines += [f"word {word}: {len(np.atleast_2d(_rows(rows)))} rows" for word, rows in adapter.words.items()]
    return lines, wrong


def _rows(rows: Any) -> Any:
    """Returns the rows of a word for the first text encoder."""
    return next(iter(rows.values())) if isinstance(rows, dict) else rows


def _read(path, kind, model):
    """Returns (adapter, name of the model that it fits, []), or (None, "", [why it fits none])."""
    trouble = []
    names = [model] if model else [*SHAPES.values(), "pocket"]
    for name, sd in zip(names, bases(model), strict=True):
        try:
            adapter = attachable.read(path, sd)
            embeddings.check(sd, adapter.words, path) if name not in SHAPES.values() else None
            return adapter, name, []
        except ValueError as error:
            trouble.append(f"for {name}: {error}")
    return None, "", trouble


def _broken(content: Any, name: str = "") -> list[str]:
    """Returns [a line that counts the tensors with NaN or infinity], [] if there are none."""
    odd = sorted(_odd(content, name))
    return [f"{len(odd)} tensors contain NaN or infinity: {trees.listing(odd)}"] if odd else []


def _odd(content, name):
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _odd(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple):
        for i, value in enumerate(content):
            yield from _odd(value, f"{name}.{i}")
    elif isinstance(content, np.ndarray) and jnp.issubdtype(content.dtype, jnp.floating):
        if not np.isfinite(content.astype(np.float32)).all():
            yield name


def counted(adapter: Adapter) -> str:
    """Returns how many weights of each part change: "weights: 192 of unet, 72 of text_encoder"."""
    parts = [f"{len(edits)} of {part}" for part, edits in adapter.edits.items() if edits]
    return f"weights: {', '.join(parts)}" if parts else "no weights"


def ranks(adapter: Adapter) -> str:
    """Returns the ranks of an adapter's LoRA, the commonest first: "16", "16 (180), 8 (12)"; "" for none."""
    edits = [getattr(edit, "factors", {}) for some in adapter.edits.values() for edit in some.values()]
    found = collections.Counter(len(factors["down"]) for factors in edits if "down" in factors)
    if len(found) == 1:
        return str(next(iter(found)))
    return ", ".join(f"{rank} ({count})" for rank, count in found.most_common(8))
