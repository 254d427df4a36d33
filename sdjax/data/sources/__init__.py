"""Sources of pictures and prompts: an image folder, one image, tables, tar shards, or the drawn world.

source.py defines the interface of a source.  `known` walks the package, so a new file here is a new source.
"""

import sys
from pathlib import Path
from typing import Any

from sdjax.data import places
from sdjax.data.sources.source import Examples, Source
from sdjax.runtime.members import members
from sdjax.settings import SettingError, prefixed

EXPECTED, OTHERS = "a folder of images, one image", "tar shards, parquet or Arrow files, or 'pocketland'"


def known() -> dict[str, type[Source]]:
    """Returns {name: class} of all sources in the order that `matching` asks them: classes with `last` at the end."""
    found = members(sys.modules[__name__], Source)
    return dict(sorted(found.items(), key=lambda item: item[1].last))


def matching(path: str) -> Source | None:
    """Returns the first source that takes a path, with default settings, or None."""
    return next((source for source in (made() for made in known().values()) if source.matches(path)), None)


def open(data: Any) -> Examples:
    """Returns the examples of a run's Data settings.

    Raises SettingError, or ValueError, for a path that is empty, missing, without pictures or of an unknown kind, and
    for settings that do not fit such pictures.
    """
    if not data.path:
        raise SettingError("data.path", "", f"{EXPECTED}, {OTHERS}")
    if data.source is not None and not data.source.matches(data.path):
        raise SettingError("data.source", data.source, f"one for data.path={data.path!r}; None takes that path's own")
    source = data.source or matching(data.path)
    if source is None:
        if not places.remote(data.path) and not Path(data.path).exists():
            raise ValueError(f"data.path={data.path!r}: no such file or folder")
        raise SettingError("data.path", data.path, f"{EXPECTED} (.jpg .png .webp), {OTHERS}")
    with prefixed("data"):
        return source.open(data)
