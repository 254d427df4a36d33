"""Files of torch.save (.pt, .bin), written without torch: plain values and numpy arrays in torch's archive.

    write("style.pt", {768: ({"linear.0.weight": weight}, {}), "name": "style"})

torch.load(weights_only=True) opens them: dicts, lists, tuples, text, numbers, None, and tensors on the CPU.
Source: the pickle protocol 2 (PEP 307, CPython's pickletools); torch/serialization.py for the archive.
"""

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.formats.storage import files, pickles

ROOT = "archive"  # folder in the archive; torch's own name if it does not write to a path
VERSION = "3\n"  # of torch's archives, caffe2/serialize/versions.h
ALIGNMENT = 64  # torch starts numbers at multiples of this many bytes
STORAGES = {kind.name: name.removeprefix("torch ") for name, kind in pickles.STORAGES.items() if name[:6] == "torch "}


def write(path: str | Path, value: Any) -> None:
    """Writes a value like torch.save, completely or not at all; equal values give equal bytes.

    value: dict, list, tuple, str, int, float, bool, None and numpy arrays, which become tensors.
    Raises TypeError for a value of another type.
    """
    arrays: list[np.ndarray] = []
    program = b"\x80\x02" + _pushed(value, arrays) + b"."
    with files.new_file(path) as temporary:
        files.ask_room(temporary, len(program) + sum(array.nbytes for array in arrays))
        _archive(temporary, program, arrays)


def _archive(path, program, arrays):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", program)
        for i, array in enumerate(arrays):
            _add(archive, f"data/{i}", array.tobytes())
        _add(archive, "version", VERSION.encode())


def _add(archive, name, content):
    """Adds a record whose bytes start at a multiple of ALIGNMENT."""
    entry = zipfile.ZipInfo(f"{ROOT}/{name}")  # dated 1980, so that equal values give equal files
    begin = archive.fp.tell() + 30 + len(entry.filename) + 4
    room = -begin % ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", room) + b"Z" * room  # torch's own padding
    archive.writestr(entry, content)


def _pushed(value, arrays):
    """Returns the steps of a pickle that push a value; adds the tensors' numbers to `arrays`."""
    if isinstance(value, np.ndarray):
        return _tensor(value, arrays)
    if type(value) is dict:
        items = b"".join(_pushed(key, arrays) + _pushed(item, arrays) for key, item in value.items())
        return b"}(" + items + b"u"
    if type(value) in (list, tuple):
        items = b"".join(_pushed(item, arrays) for item in value)
        return b"](" + items + b"e" if type(value) is list else b"(" + items + b"t"
    return _plain(value)


def _plain(value):
    """Returns the step that pushes a text, a number or None."""
    if value is None or type(value) is bool:
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if type(value) is int:
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if type(value) is float:
        return b"G" + struct.pack(">d", value)
    if type(value) is str:
        raw = value.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw
    raise TypeError(f"{type(value).__name__}: torch's files hold plain values and arrays here")


def _tensor(array, arrays):
    """Returns the steps that create a tensor: a call of torch's own function with a storage of the archive."""
    kind, size = STORAGES.get(array.dtype.name), array.shape
    if kind is None:
        raise TypeError(f"numbers of type {array.dtype.name}: expected one of {', '.join(STORAGES)}")
    arrays.append(np.ascontiguousarray(array))
    steps = [stride // array.itemsize for stride in np.empty(size, array.dtype).strides]
    storage = _tuple(
        _plain("storage"), f"ctorch\n{kind}\n".encode(), _plain(str(len(arrays) - 1)), _plain("cpu"), _plain(array.size)
    )
    hooks = b"ccollections\nOrderedDict\n)R"
    shape = (_tuple(*map(_plain, size)), _tuple(*map(_plain, steps)))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(storage + b"Q", _plain(0), *shape, _plain(False), hooks) + b"R"
    )


def _tuple(*steps):
    return b"(" + b"".join(steps) + b"t"
