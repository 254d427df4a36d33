"""Suggests method and settings for training on a few pictures, and estimates time and memory.

    found = suggest(library, queue, "pocket", "person", count=5)
    found.recipe, found.settings, found.sentence

The rules are our choice.  An E4T encoder for the kind of subject learns in seconds.  Otherwise a LoRA works in every
tool.  A style of one or two pictures becomes a word, because a LoRA would learn their contents.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdjax.formats import pipeline
from sdjax.formats.storage import files
from sdjax.service.library import Entry, Library
from sdjax.service.queue import DONE, Queue
from sdjax.service.tokens import Tokens
from sdjax.settings import SettingError
from sdjax.text.rare import rare

KINDS = ("person", "pet", "thing", "style")
DOMAINS = {"person": ("face", "person", "man", "woman"), "pet": ("cat", "dog", "pet")}  # the words of E4T encoders
NOUNS = {"person": "person", "pet": "pet", "thing": "object", "style": "style"}
SD15 = 3.44e9  # bytes of the UNet of Stable Diffusion 1.5 in float32
SMALL = 2e8  # largest UNet, in bytes, that learns at the embedded model's rates
FITS = ((24e9, "24GB"), (16e9, "16GB"), (12e9, "12GB"), (0, "8GB"))
# Seconds per row of SD 1.5 at 512 x 512: measured on one H200 (docs/log/2026-11.md); on CPUs, pocket's 0.04 s
# on two cores, scaled by the size of the UNet.  The same for compilation.
ROW = {"gpu": 0.02, "tpu": 0.03, "cpu": 11.0}
COMPILED = {"gpu": 60.0, "tpu": 60.0, "cpu": 45.0}
# Bytes that a run needs beside the UNet's, of SD 1.5: docs/fit_memory.json; the embedded model's are measured.
NEEDED = {"lora": 3.2e9, "textual_inversion": 3.2e9, "e4t_tune": 15e9, "dreambooth": 11.5e9}
LEAST = 1.2e9


@dataclass(frozen=True)
class Suggestion:
    """A suggested run.

    recipe, settings: of the order.  method: its name for users.  word: the subject's word in prompts.
    seconds, memory: estimates, memory in bytes.  known: whether `seconds` comes from a similar earlier run.
    """

    recipe: str
    method: str
    word: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    memory: float = 0.0
    known: bool = False


def suggest(library: Library, queue: Queue, model: str, kind: str, count: int) -> Suggestion:
    """Returns the Suggestion for `count` pictures of a kind.  Raises SettingError for an unknown kind."""
    if kind not in KINDS:
        raise SettingError("kind", kind, f"one of {', '.join(KINDS)}")
    entry = library.find("model", model or library.own.name)
    device = queue.option("device", {}) or {}
    platform = device.get("platform", "cpu")
    platform = platform if platform in ROW else "cpu"
    size, memory = unet_bytes(entry), float(device.get("memory", 0) or 0)
    made = _chosen(library, entry, kind, count, size)
    settings = dict(made.settings)
    if platform != "cpu" and size > SMALL:
        settings["fit"] = next(name for least, name in FITS if memory >= least)
    seconds, known = _seconds(queue, made.recipe, entry, settings, size, platform)
    return Suggestion(made.recipe, made.method, made.word, settings, seconds, _memory(made.recipe, size), known)


def _chosen(library: Library, entry: Entry, kind: str, count: int, size: float) -> Suggestion:
    if encoder(entry) in DOMAINS.get(kind, ()):
        several = {"data.concept": "same"} if count > 1 else {}
        recipe = "pocket/tune" if entry.source == "pocket" else "e4t_tune"
        return Suggestion(recipe, "one-photo encoder (E4T)", "*s", several)
    small = size < SMALL
    if kind == "style" and count < 3:
        steps = 400 if small else 2000
        return Suggestion("textual_inversion", "a new word (textual inversion)", "<new>",
                          {"steps": steps, "data.templates": "style", "method.init": "style"})  # fmt: skip
    word = f"{rarest(library, entry)} {NOUNS[kind]}"
    templates = "style" if kind == "style" else "object"
    steps = max(300, min(400, 60 * count)) if small else max(600, min(2000, 120 * count))
    rate = {"optim.lr": 1e-3} if small else {}
    settings = {"data.word": word, "data.templates": templates, "steps": steps, **rate}
    return Suggestion("lora", "a small add-on file (LoRA)", word, settings)


def encoder(entry: Entry) -> str:
    """Returns the domain of a model's E4T encoder, "" without one."""
    try:
        return str(files.read_json(pipeline.locate(entry.source) / "e4t" / "config.json").get("domain", ""))
    except (ValueError, OSError):
        return ""


def rarest(library: Library, entry: Entry) -> str:
    """Returns a word that is rare for the model; "sks" if its vocabulary is not on this machine."""
    tokenizer = Tokens(library).of(entry.name)
    return next(iter(rare(tokenizer, 1)), "sks") if tokenizer is not None else "sks"


def unet_bytes(entry: Entry) -> float:
    """Returns about how many bytes a model's UNet has in float32; SD 1.5's if unknown."""
    try:
        folder = pipeline.locate(entry.source) / "unet"
        there = [path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
        return float(max(there))
    except (ValueError, OSError):
        return 1e6 if entry.source.startswith("random:tiny") else SD15


def _seconds(queue: Queue, recipe: str, entry: Entry, settings: Any, size: float, platform: str) -> tuple[float, bool]:
    """Returns (seconds, whether they come from a similar run)."""
    for job in queue.newest(100, [DONE]):
        asked = job.request
        same = job.kind == "training" and asked.get("recipe") == recipe and asked.get("model", "") == entry.name
        steps = (asked.get("settings") or {}).get("steps")
        if same and job.started and job.ended and steps == settings.get("steps"):
            return job.ended - job.started, True
    rows = 15 * 16 if recipe.endswith("tune") else int(settings.get("steps", 1000))
    rows *= 4 if recipe == "textual_inversion" else 1
    return COMPILED[platform] + rows * ROW[platform] * size / SD15, False


def _memory(recipe: str, size: float) -> float:
    named = "e4t_tune" if recipe == "pocket/tune" else recipe
    return LEAST + NEEDED.get(named, 8e9) * min(1.0, size / SD15)


def free_memory() -> int:
    """Returns the free bytes of this machine's memory."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device(platform: str, stats: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns a worker's report on its device: {"platform", "memory": free bytes}."""
    if stats and stats.get("bytes_limit"):
        return {"platform": platform, "memory": stats["bytes_limit"] - stats.get("bytes_in_use", 0)}
    return {"platform": platform, "memory": free_memory()}
