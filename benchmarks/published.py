"""Writes what a page of docs/ shows of a measurement: its figures as JSON, and its picture.

published(Path("docs"), "upscaler", table, sheet)        docs/upscaler.json, docs/upscaler.webp
added(Path("docs/aot.json"), {"lora": figures})          beside the figures that the file has
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.formats.storage import files

QUALITY = 80  # of the pictures, WebP's


def published(folder: Path | None, name: str, table: Any, sheet: np.ndarray | Image.Image | None) -> None:
    """Writes FOLDER/NAME.json and FOLDER/NAME.webp, nothing without a folder; a sheet of None leaves the picture."""
    if folder is None:
        return
    _write(folder / f"{name}.json", table)
    if sheet is None:
        return
    picture = sheet if isinstance(sheet, Image.Image) else Image.fromarray(sheet)
    with files.new_file(folder / f"{name}.webp") as temporary:
        picture.save(temporary, "WEBP", quality=QUALITY, method=6)


def added(path: Path, figures: Mapping[str, Any]) -> None:
    """Adds {name: figures} to a JSON file, which is sorted by name; its other figures stay."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    _write(path, dict(sorted({**found, **figures}.items())))


def _write(path, table):
    with files.new_file(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n")
