"""The results of a run and their use in pictures.

use = used(services.library, queue, job)            # Used(prompt="a photo of *s", model="run 1deaa2a5", ...)
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.formats.adapters import kinds
from sdjax.images import reading
from sdjax.service import teaching, uploads
from sdjax.service.library import Library
from sdjax.service.queue import Job
from sdjax.settings import SettingError


@dataclass(frozen=True)
class Used:
    """How pictures are made with what a run left.

    model: the library's name, "" for the usual one.  prompt: with the word, and with the adapters by name.
    image: the upload that the word stands for, where the model looks at one.
    """

    prompt: str
    model: str = ""
    image: str = ""


def used(library: Library, job: Job) -> Used:
    """Returns how pictures are made with what a run left; keeps its adapters among those that prompts name.

    Raises SettingError for a run that left nothing.
    """
    folder = library.place.run(job.key)
    left = folder / "export"
    told = _json(folder / "config.json")
    word = word_of(told)
    prompt = f"a house in {word}" if told.get("data", {}).get("templates") == "style" else f"a photo of {word}".strip()
    if (left / "model_index.json").is_file():
        return Used(prompt, f"run {job.key[:8]}", _picture(library, left, told))
    if not any(left.glob("*.safetensors")):
        raise SettingError("job", job.id, "a run that left something to use")
    model = str(job.request.get("model") or "")
    tags = [_named(library, name, prompt) for name in _kept(library, job)]
    words = [name for kind, name in tags if kind == "embedding"]
    named = [f"<{kind}:{name}:1>" for kind, name in tags if kind != "embedding"]
    if words and word and not named:
        prompt = prompt.replace(word, words[0])
    return Used(" ".join([prompt, *named]), model)


def word_of(told: dict[str, Any]) -> str:
    """Returns what prompts call the subject of a run, from its config.json."""
    data, method = told.get("data") or {}, told.get("method") or {}
    parts = [method, *(method.get("parts") or [])]
    own = next((part["word"] for part in parts if isinstance(part, dict) and part.get("word")), "")
    return str(data.get("word") or own)


def _kept(library: Library, job: Job) -> list[str]:
    """Returns the names, without endings, of a run's adapters among those that prompts name."""
    name = re.sub(r"[^\w-]+", "-", str(job.request.get("name") or "")).strip("-_") or f"run-{job.id}"
    there = sorted((library.place.run(job.key) / "export").glob("*.safetensors"))
    for number in range(1, 100):
        own = name if number == 1 else f"{name}-{number}"
        names = [f"{own}{f'-{i + 1}' if i else ''}" for i in range(len(there))]
        taken = [library.place.named / f"{one}.safetensors" for one in names]
        if all(path.is_file() and _same(path, source) for path, source in zip(taken, there, strict=True)):
            return names
        if not any(path.exists() for path in taken):
            teaching.keep(library.place, job.key, own)
            return names
    raise SettingError("name", name, "another name: this one is taken")


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _named(library: Library, name: str, prompt: str) -> tuple[str, str]:
    """Returns (kind, name) of an adapter that prompts name."""
    for kind in dict.fromkeys(one.called for one in kinds.known().values() if one.called):
        try:
            return kind, library.find(kind, name).stem
        except SettingError:
            continue
    raise SettingError("name", name, "an adapter of the library")


def _picture(library: Library, left: Path, told: dict[str, Any]) -> str:
    """Returns the upload that an E4T model's word stands for, the first picture; "" where it has its own."""
    if not (left / "e4t").is_dir() or (left / "e4t" / "concept.png").is_file():
        return ""
    try:
        first = reading.find(str((told.get("data") or {}).get("path") or ""))[0].path
        return uploads.keep(library.place, first.read_bytes())
    except (ValueError, OSError, IndexError):
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
