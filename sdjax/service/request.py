"""A request for one picture: settings, folder of its files, and name.

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

    settings: one of settings.TASKS.  folder: where the files that it names lie; None is anywhere, for those who start
    the program.  name: of the picture; row: of the list that it stands in, counted from 1.
    """

    settings: Task
    folder: Path | None = None
    name: str = ""
    row: int = 0

    def file(self, name: str) -> Path:
        """Returns the path of a file.  Raises ValueError for one outside of the request's folder."""
        path = (Path() if self.folder is None else self.folder) / name
        if self.folder is not None and not path.resolve().is_relative_to(self.folder):
            raise ValueError(f"{name}: lies outside {self.folder}; expected a file in the list's own folder")
        return path


def several(settings: Iterable[Task], count: int = 1) -> list[Request]:
    """Returns requests for `count` pictures of each settings; their seeds count on through all of them."""
    each = [one for one in settings for _ in range(count)]
    return [Request(one.numbered(i)) for i, one in enumerate(each)]


def by_name(adapter: str) -> bool:
    """Returns whether an adapter is named as in prompts, <lora:ink:0.8>, and not as a file, which may be <cat>=FILE."""
    return adapter.startswith("<") and ">=" not in adapter


def adapters_of(settings: Task) -> list[tuple[str, bool]]:
    """Returns the adapters that the settings ask for, each with whether it is named as in prompts, and not a file."""
    return [(one, by_name(one)) for one in settings.adapter]


def files_of(settings: Task) -> list[str]:
    """Returns the adapters that the settings ask for as files, FILE[:STRENGTH]."""
    return [one for one, named in adapters_of(settings) if not named]


def check_named(settings: Task, allowed: Sequence[str] = ()) -> None:
    """Raises SettingError for an adapter that is a file, where who asks may only name them; allowed: files that may."""
    for one in files_of(settings):
        if one not in allowed:
            raise SettingError("adapter", one, grammars.expected(kinds.tags()))


def taken_apart(settings: Task) -> tuple[str, tuple[Any, ...]]:
    """Returns (the prompt without adapters, the adapters that it and the settings ask for by name).

    Raises ValueError for one that cannot be read.
    """
    tags, named = kinds.tags(), " ".join(one for one, named in adapters_of(settings) if named)
    rest, more = grammars.adapters(named, tags)
    if rest.strip():
        raise SettingError("adapter", named, grammars.expected(tags))
    prompt, _ = settings.texts
    if settings.naming != "a1111":
        return prompt, more
    text, own = grammars.adapters(prompt, tags)
    return text, own + more


def texts(settings: Task) -> list[str]:
    """Returns the texts of a picture in which embeddings may be named."""
    return [taken_apart(settings)[0], settings.texts[1]]


def named_files(request: Request) -> dict[str, str]:
    """Returns {setting: name} of the files that a picture may have for itself: its image and its mask."""
    known = fields(type(request.settings))
    found = {name: getattr(request.settings, name) for name, one in known.items() if one.about.own and one.about.file}
    return {name: value for name, value in found.items() if value}


def grouped(requests: Sequence[Request], kind: Callable[[Request], Any] = lambda _: None) -> Iterator[list[Request]]:
    """Yields the requests that can be made together, in order of their first appearance.

    Those agree in all settings that no picture has for itself, in the files that they have, in the adapters that they
    ask for, and in kind(request).
    """
    groups: dict[str, list[Request]] = {}
    for request in requests:
        known, made = fields(type(request.settings)), request.settings
        shared = [getattr(made, name) for name, one in known.items() if not one.about.own]
        about = [type(made).__name__, shared, [*named_files(request)], taken_apart(made)[1], kind(request)]
        groups.setdefault(json.dumps(about, default=repr), []).append(request)
    yield from groups.values()
