"""Where pictures and words come from: an image folder, one image, or the drawn world.

source.py says what a source is; a new file here is a new source, found by walking the package (`known`).
"""

import sys
from pathlib import Path
from typing import Any

from sdjax.data.sources.source import Examples, Source
from sdjax.runtime.members import members
from sdjax.settings import SettingError, prefixed


def known() -> dict[str, type[Source]]:
    """Returns {name: class} of all sources, in the order in which a path is shown to them."""
    return members(sys.modules[__name__], Source)


def matching(path: str) -> Source | None:
    """Returns the first source, with its own defaults, that takes a path; None where none does."""
    return next((source for source in (made() for made in known().values()) if source.matches(path)), None)


def open(data: Any) -> Examples:
    """Returns the examples that a run's Data settings name.

    Raises SettingError, or ValueError, for a path that is empty, is not there, holds no pictures or is of no known
    kind, and for settings that are not for such pictures.
    """
    if not data.path:
        raise SettingError("data.path", "", "a folder of images, one image, or 'pocketland'")
    if data.source is not None and not data.source.matches(data.path):
        raise SettingError("data.source", data.source, f"one for data.path={data.path!r}; None takes that path's own")
    source = data.source or matching(data.path)
    if source is None:
        if not Path(data.path).exists():
            raise ValueError(f"data.path={data.path!r}: no such file or folder")
        raise SettingError("data.path", data.path, "a folder of images, one image (.jpg .png .webp), or 'pocketland'")
    with prefixed("data"):
        return source.open(data)
