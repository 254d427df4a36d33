"""Arrow tables on disk, computed once, then memory-mapped and checked: indexes of shards, unpacked row groups.

    texts = kept(folder, ["texts", "train-00000.parquet", size, stamp], make)      # make() yields record batches
    Column([texts, others], "caption")[123456]                                     # one value, read from the disk

A file begins with 64 bytes (a mark, the length and the CRC-32 of the rest); an Arrow IPC file follows.  The file's name
is a digest of its key.  A damaged file is computed again.  A million rows need no Python objects: memory holds only the
pages that are read, and the system may drop them again.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sdjax.formats.storage import files

HEAD = struct.Struct("<16sQI36x")  # mark, length and CRC-32 of the Arrow file; 64 bytes keep its buffers aligned
MAGIC = b"sdjax table 1\n\0\0"
CHUNK = 1 << 20  # bytes per step of the checksum
NEEDED = 'needs pyarrow: pip install -e ".[tables]"'


def arrow() -> Any:
    """Returns the module pyarrow.  Raises ValueError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"pictures in tables and shards: {NEEDED}") from None
    return pyarrow


def folder(index: str) -> Path:
    """Returns the folder of tables: `index`, else $SDJAX_DATA, else ~/.cache/sdjax/data."""
    return Path(index or os.environ.get("SDJAX_DATA") or Path.home() / ".cache" / "sdjax" / "data")


def kept(folder: Path, key: Sequence[Any], make: Callable[[], Iterable[Any]], check: bool = True) -> Any:
    """Returns the pyarrow.Table of a key (plain values), memory-mapped; writes a missing one from make().

    make: yields one or more pyarrow.RecordBatches of one schema, which are written one by one.
    check: verify the checksum of the whole file; otherwise only the mark and the length.
    Raises ValueError if the folder cannot be written.
    """
    path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.table"
    found = _opened(path, check)
    if found is None:
        _write(path, make())
        found = _opened(path, check)
        assert found is not None  # just written
    return found


def _opened(path, check):
    """Returns the table of a file; None for a missing or damaged file."""
    pyarrow = arrow()
    try:
        with path.open("rb") as file:
            mark, length, total = HEAD.unpack(file.read(HEAD.size))
            whole = mark == MAGIC and path.stat().st_size == HEAD.size + length
            if not whole or (check and checksum(file) != total):
                return None
        with pyarrow.memory_map(str(path)) as mapped:
            return pyarrow.ipc.open_file(pyarrow.BufferReader(mapped.read_buffer()[HEAD.size :])).read_all()
    except (OSError, struct.error, pyarrow.ArrowException):
        return None


def _write(path, batches):
    pyarrow = arrow()
    batches = iter(batches)
    first = next(batches)
    with files.new_file(path) as temporary:
        with temporary.open("wb") as file:
            file.write(bytes(HEAD.size))
            with pyarrow.ipc.new_file(file, first.schema) as writer:
                writer.write_batch(first)
                for batch in batches:
                    writer.write_batch(batch)
        with temporary.open("r+b") as file:
            file.seek(HEAD.size)
            total = checksum(file)
            length = file.tell() - HEAD.size
            file.seek(0)
            file.write(HEAD.pack(MAGIC, length, total))


class Column:
    """A column of several tables as one sequence."""

    def __init__(self, tables: Sequence[Any], name: str) -> None:
        self.chunks = [chunk for table in tables for chunk in table.column(name).chunks if len(chunk)]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: int) -> Any:
        """Returns value i as a Python value."""
        k, place = located(self.ends, i)
        return self.chunks[k][place].as_py()

    def numbers(self) -> np.ndarray:
        """Returns the values of a numeric column as one array."""
        return np.concatenate([chunk.to_numpy() for chunk in self.chunks])

    def where(self, test: Callable[[Any], Any]) -> tuple[int, int]:
        """Returns (number of values that pass a vectorised pyarrow test, index of the first one or -1)."""
        count, first, start = 0, -1, 0
        for chunk in self.chunks:
            passed = np.flatnonzero(test(chunk).to_numpy(zero_copy_only=False))
            if len(passed) and first < 0:
                first = start + int(passed[0])
            count, start = count + len(passed), start + len(chunk)
        return count, first


def bare(column: Column, where: Callable[[int], str]) -> tuple[int, str]:
    """Returns (number of rows without a caption, where(the first of them) or "").

    The column holds texts or lists of texts; null, an empty list and white space count as no caption.
    """
    arrow()
    from pyarrow import compute, types

    functions: Any = compute  # its functions exist only at run time, unknown to type checkers

    def none(chunk):
        if types.is_list(chunk.type) or types.is_large_list(chunk.type):
            empty = functions.equal(functions.list_value_length(chunk), 0)
        else:
            empty = functions.match_substring_regex(chunk, r"^\s*$")
        return functions.fill_null(empty, True)

    count, first = column.where(none)
    return count, where(first) if count else ""


def checksum(file: BinaryIO) -> int:
    """Returns the CRC-32 of a file from its current position to its end."""
    total = 0
    while block := file.read(CHUNK):
        total = zlib.crc32(block, total)
    return total


def located(ends: np.ndarray, i: int) -> tuple[int, int]:
    """Returns (k, place): item i is item `place` of part k.  ends: the cumulative sizes of the parts."""
    k = int(np.searchsorted(ends, i, side="right"))
    return k, i - (int(ends[k - 1]) if k else 0)
