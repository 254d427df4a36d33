"""Reads and changes the metadata of a safetensors file without touching its tensors.

found = metadata("cat.safetensors")                    # {name: text}
tell("cat.safetensors", {**found, "modelspec.title": "cat"})
"""

import hashlib
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Mapping
from typing import Any

from sdjax.formats.storage import files
from sdjax.formats.storage.tensor_file import TensorFile


def metadata(path: str | pathlib.Path) -> dict[str, str]:
    """Returns {name: text}; raises ValueError for a damaged file or another kind."""
    return dict(TensorFile(path).metadata)


def tell(path: str | pathlib.Path, values: Mapping[str, str]) -> None:
    """Rewrites the file with this metadata; the tensors' bytes do not change."""
    header, begin = _header(path)
    whole = {**header, "__metadata__": dict(sorted(values.items()))}
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    size = 8 + len(text) + os.path.getsize(path) - begin
    with files.new_file(path) as temporary, open(path, "rb") as old:
        files.ask_room(temporary, size)
        _copied(temporary, text, old, begin)


def _copied(path, text, old, begin):
    """Writes a header and an open file's bytes from `begin` on."""
    with open(path, "wb") as new:
        new.write(struct.pack("<Q", len(text)) + text)
        old.seek(begin)
        shutil.copyfileobj(old, new, 1 << 20)


def sha256(path: str | pathlib.Path) -> str:
    """Returns the SHA-256 of the tensors' bytes, 64 hex digits, without the cache of hashes.autov3."""
    total, (_, begin) = hashlib.sha256(), _header(path)
    with open(path, "rb") as file:
        file.seek(begin)
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def _header(path) -> tuple[dict[str, Any], int]:
    """Returns (the header, the first byte of the tensors) of an undamaged safetensors file."""
    TensorFile(path)  # raises for a damaged one
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)), 8 + size
