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
    """Settings for pictures with a run's results.

    model: its name in the library, "" for the default.  prompt: with the word and the adapters' tags.
    image: the upload that an E4T word stands for, "" for other words.
    """

    prompt: str
    model: str = ""
    image: str = ""


def used(library: Library, job: Job) -> Used:
    """Returns the settings for pictures with a run's results; copies its adapters to the folder that prompts name.

    Raises SettingError for a run without results.
    """
    folder = library.place.run(job.key)
    left = folder / "export"
    told = _json(folder / "config.json")
    word = word_of(told)
    prompt = f"a house in {word}" if told.get("data", {}).get("templates") == "style" else f"a photo of {word}".strip()
    if (left / "model_index.json").is_file():
        return Used(prompt, f"run {job.key[:8]}", _picture(library, left, told))
    control = next((one.name for one in library.entries("controlnet") if one.path == left), None)
    if control is not None:
        raise SettingError(
            "job", job.id, "a run of a model or an adapter", f"choose its ControlNet by name: {control!r}"
        )
    there = teaching.adapters(left)
    if not there:
        raise SettingError("job", job.id, "a run with results")
    model = str(job.request.get("model") or "")
    tags = [_named(library, name, prompt) for name in _kept(library, job, there)]
    words = [name for kind, name in tags if kind == "embedding"]
    named = [f"<{kind}:{name}:1>" for kind, name in tags if kind != "embedding"]
    if words and word and not named:
        prompt = prompt.replace(word, words[0])
    return Used(" ".join([prompt, *named]), model)


def word_of(told: dict[str, Any]) -> str:
    """Returns the word for the subject of a run, from its config.json."""
    data, method = told.get("data") or {}, told.get("method") or {}
    parts = [method, *(method.get("parts") or [])]
    own = next((part["word"] for part in parts if isinstance(part, dict) and part.get("word")), "")
    return str(data.get("word") or own)


def _kept(library: Library, job: Job, there: list[Path]) -> list[str]:
    """Returns the names, without suffix, of a run's adapters in the folder that prompts name."""
    name = re.sub(r"[^\w-]+", "-", str(job.request.get("name") or "")).strip("-_") or f"run-{job.id}"
    for number in range(1, 100):
        own = name if number == 1 else f"{name}-{number}"
        taken = [library.place.named / one for one in teaching.kept_names(own, there)]
        names = [path.stem for path in taken]
        if all(path.is_file() and _same(path, source) for path, source in zip(taken, there, strict=True)):
            return names
        if not teaching.used_stems(library.place).intersection(names):
            teaching.keep(library.place, job.key, own)
            return names
    raise SettingError("name", name, "an unused name")


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _named(library: Library, name: str, prompt: str) -> tuple[str, str]:
    """Returns (kind, name) of an adapter in that folder."""
    for kind in dict.fromkeys(one.called for one in kinds.known().values() if one.called):
        try:
            return kind, library.find(kind, name).stem
        except SettingError:
            continue
    raise SettingError("name", name, "an adapter in the library")


def _picture(library: Library, left: Path, told: dict[str, Any]) -> str:
    """Returns the upload for an E4T model's word, the run's first picture; "" if the model has its own."""
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
