"""A request for one picture: settings, the folder of its files, and a name.

some = several("text2img", {"prompt": "a cat", "seed": 7}, count=4)
for group in grouped(some): maker.make(group)
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.formats.adapters import kinds
from sdjax.sampling.fields import fields
from sdjax.sampling.settings import Task
from sdjax.settings import SettingError
from sdjax.text import grammars


@dataclass(frozen=True)
class Request:
    """A picture to make.

    settings: one of settings.TASKS.  folder: the folder of its files; None allows any, for command lines.
    name: of the picture.  row: its row in a list, from 1.
    """

    settings: Task
    folder: Path | None = None
    name: str = ""
    row: int = 0

    def file(self, name: str) -> Path:
        """Returns the path of a file.  Raises ValueError for a file outside the request's folder."""
        path = (Path() if self.folder is None else self.folder) / name
        if self.folder is not None and not path.resolve().is_relative_to(self.folder):
            raise ValueError(f"{name}: lies outside {self.folder}; expected a file in the list's own folder")
        return path


def several(settings: Iterable[Task], count: int = 1) -> list[Request]:
    """Returns `count` requests for each settings; seeds count up through all of them."""
    each = [one for one in settings for _ in range(count)]
    return [Request(one.numbered(i)) for i, one in enumerate(each)]


def by_name(adapter: str) -> bool:
    """Returns whether an adapter is a prompt's tag, <lora:ink:0.8>, not a file, which may be <cat>=FILE."""
    return adapter.startswith("<") and ">=" not in adapter


def adapters_of(settings: Task) -> list[tuple[str, bool]]:
    """Returns the adapters of the settings, each with whether it is a prompt's tag and not a file."""
    return [(one, by_name(one)) for one in settings.adapter]


def files_of(settings: Task) -> list[str]:
    """Returns the adapters that the settings give as files, FILE[:STRENGTH]."""
    return [one for one, named in adapters_of(settings) if not named]


def check_named(settings: Task, allowed: Sequence[str] = ()) -> None:
    """Raises SettingError for an adapter given as a file that is not in `allowed`: requests may only name adapters."""
    for one in files_of(settings):
        if one not in allowed:
            raise SettingError("adapter", one, grammars.expected(kinds.tags()))


def taken_apart(settings: Task) -> tuple[str, tuple[Any, ...]]:
    """Returns (the prompt without adapter tags, the adapters that prompt and settings name).

    Raises ValueError for an invalid tag.
    """
    tags, named = kinds.tags(), " ".join(one for one, named in adapters_of(settings) if named)
    rest, more = grammars.adapters(named, tags)
    if rest.strip():
        raise SettingError("adapter", named, grammars.expected(tags))
    prompt, _ = settings.texts
    if settings.naming != "a1111":
        return prompt, more
    text, own = grammars.adapters(prompt, tags)
    later, _ = _later(settings)
    if any(one not in own + more for one in grammars.adapters(later, tags)[1]):
        raise SettingError("hires_prompt", later, "no adapters but those of the prompt, which act in both passes")
    return text, own + more


def bare(settings: Any) -> Any:
    """Returns the settings with prompts without adapter tags."""
    made, (later, _) = settings.saying(taken_apart(settings)[0]), _later(settings)
    if not later or settings.naming != "a1111":
        return made
    return made.saying_later(grammars.adapters(later, kinds.tags())[0])


def texts(settings: Task) -> list[str]:
    """Returns the texts of a picture that may name embeddings."""
    made = bare(settings)
    return [*made.texts, *filter(None, _later(made))]


def _later(settings: Task) -> tuple[str, str]:
    """Returns the texts that only a second pass reads, "" for none."""
    return getattr(settings, "later_texts", ("", ""))


def named_files(request: Request) -> dict[str, str]:
    """Returns {setting: name} of a picture's own files: its image and its mask."""
    known = fields(type(request.settings))
    found = {name: getattr(request.settings, name) for name, one in known.items() if one.about.own and one.about.file}
    return {name: value for name, value in found.items() if value}


def grouped(requests: Sequence[Request], kind: Callable[[Request], Any] = lambda _: None) -> Iterator[list[Request]]:
    """Yields groups of requests that one call can make, in order of their first appearance.

    The requests of a group agree in all settings that pictures of a call share, in their files' settings, in their
    adapters, and in kind(request).
    """
    groups: dict[str, list[Request]] = {}
    for request in requests:
        known, made = fields(type(request.settings)), request.settings
        shared = [getattr(made, name) for name, one in known.items() if not one.about.own]
        about = [type(made).__name__, shared, [*named_files(request)], taken_apart(made)[1], kind(request)]
        groups.setdefault(json.dumps(about, default=repr), []).append(request)
    yield from groups.values()
