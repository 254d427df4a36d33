"""Writes a measurement's figures (JSON) and picture (WebP) for the pages of docs/.

published(Path("docs"), "upscaler", table, sheet)        docs/upscaler.json, docs/upscaler.webp
added(Path("docs/aot.json"), {"lora": figures})          keeps the file's other figures
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.formats.storage import files

QUALITY = 80  # of WebP


def published(folder: Path | None, name: str, table: Any, sheet: np.ndarray | Image.Image | None) -> None:
    """Writes FOLDER/NAME.json and, with a sheet, FOLDER/NAME.webp; without a folder it writes nothing."""
    if folder is None:
        return
    _write(folder / f"{name}.json", table)
    if sheet is None:
        return
    picture = sheet if isinstance(sheet, Image.Image) else Image.fromarray(sheet)
    with files.new_file(folder / f"{name}.webp") as temporary:
        picture.save(temporary, "WEBP", quality=QUALITY, method=6)


def added(path: Path, figures: Mapping[str, Any]) -> None:
    """Adds {name: figures} to a JSON file and sorts it by name; the other figures stay."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    _write(path, dict(sorted({**found, **figures}.items())))


def _write(path, table):
    with files.new_file(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n")
