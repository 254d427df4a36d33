"""Reads and changes the metadata of a safetensors file without touching its tensors, and keeps a folder's in a file.

found = metadata("cat.safetensors")                    # {name: text}
tell("cat.safetensors", {**found, "modelspec.title": "cat"})
described("cat")                                       # what a model folder, or one file, says of its training
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

NAME = "metadata.json"  # of a model folder: the texts of a single file's header; diffusers ignores it
PREVIEW = "preview.png"  # a picture beside it
DESCRIBING = ("ss_", "modelspec.")  # kohya's names and ModelSpec's
HASHES = ("sshs_model_hash", "modelspec.hash_sha256")
OPEN = "0" * 64  # the place of a hash that is known after the tensors are written


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


def described(source: str | pathlib.Path) -> dict[str, str]:
    """Returns the texts of DESCRIBING names in a folder's metadata.json or a safetensors header, without hashes.

    {} for a source without any.  Raises ValueError for a damaged file.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        found = files.read_json(path / NAME) if (path / NAME).is_file() else {}
    else:
        found = metadata(path) if path.suffix == ".safetensors" and path.is_file() else {}
    texts = {name: text for name, text in found.items() if isinstance(text, str) and name.startswith(DESCRIBING)}
    return {name: text for name, text in texts.items() if name not in HASHES}


def describe(folder: pathlib.Path, told: Mapping[str, str]) -> None:
    """Writes metadata.json into a new model folder, if there is anything to say."""
    if told:
        files.write_json(folder / NAME, dict(sorted(told.items())))


def unsealed() -> dict[str, str]:
    """Returns the metadata of a new file that `seal_new` fills with the hash of its tensors."""
    return {HASHES[0]: OPEN, HASHES[1]: f"0x{OPEN}"}


def seal_new(path: pathlib.Path) -> None:
    """Writes the hash of a new file's tensors over the zeros of `unsealed`, without writing the tensors again."""
    text, begin = _header(path)[0]["__metadata__"], _header(path)[1]
    found = sha256(path)
    with open(path, "r+b") as file:
        header = file.read(begin)
        for name in HASHES:
            old, new = (f'"{name}":"{one}"'.encode() for one in (text[name], text[name].replace(OPEN, found)))
            header = header.replace(old, new)
        file.seek(0)
        file.write(header)


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
