"""Writes what a page of docs/ shows of a measurement: its figures as JSON, and its picture.

published(Path("docs"), "upscaler", table, sheet)        docs/upscaler.json, docs/upscaler.webp
"""

import json
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
    with files.new_file(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n")
    if sheet is None:
        return
    picture = sheet if isinstance(sheet, Image.Image) else Image.fromarray(sheet)
    with files.new_file(folder / f"{name}.webp") as temporary:
        picture.save(temporary, "WEBP", quality=QUALITY, method=6)
