"""Settings in the pictures of other programs, one file each.

    read(picture_texts.of(path), path.name)        # ("ComfyUI", {"prompt": ..., "seed": ...}) or None

Texts name prompts and numbers only: no file, model or host in them is opened.
"""

import sys
from collections.abc import Mapping
from typing import Any

from sdjax.runtime.members import values
from sdjax.service.foreign.kind import Kind


def read(held: Mapping[str, str], name: str) -> tuple[str, dict[str, Any]] | None:
    """Returns (program, {setting: value}) of the texts in a file of a name, None for no other program's.

    The values are unchecked.
    """
    for kind in values(sys.modules[__name__], Kind):
        said = kind.read(held, name)
        found = {setting: value for setting, value in (said or {}).items() if value not in (None, "")}
        if found:
            return kind.program, found
    return None
