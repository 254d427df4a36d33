"""Pictures and captions in table cells, shared by the parquet and Arrow sources; Cells is a Table of rows.py."""

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sdjax.data import places, tables
from sdjax.data.places import File
from sdjax.data.sources.columns import Columns, cell
from sdjax.data.sources.rows import held, said_texts
from sdjax.images import reading
from sdjax.images.reading import Held

BATCH = 4096  # rows per record batch of stored shapes
SUM = "CRC-32 of the picture"  # name of a column


class Cells:
    """The rows of several files.

    counts: rows of each file.  block(i): (the pyarrow.Table or record batch with row i, the row's place in it); if it
    has a column SUM, pictures are checked against it.  captions: the column of captions, or None.
    kind: format of the files, for messages.  folder: where `shapes` stores its results.
    """

    def __init__(
        self,
        files: Sequence[File],
        counts: Sequence[int],
        columns: Columns,
        block: Callable[[int], tuple[Any, int]],
        captions: tables.Column | None,
        kind: str,
        folder: Path,
    ) -> None:
        self.files, self.columns, self.block, self.captions = files, columns, block, captions
        self.ends = np.cumsum(counts, dtype=np.int64)
        self.kind, self.folder, self.remote = kind, folder, places.remote(files[0].path)
        if not len(self):
            raise ValueError(f"{files[0].path}: no rows")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, i: int) -> str:
        """Returns the file and the row number, from 1, of row i, for messages."""
        k, place = tables.located(self.ends, i)
        return f"{self.files[k].path}, row {place + 1}"

    def picture(self, i: int) -> Held:
        """Returns the bytes of row i's picture.  Raises ValueError naming file and row."""
        block, row = self.block(i)
        found = held(self.where(i), cell(block.column(self.columns.picture), row))
        if SUM in block.schema.names and block.column(SUM)[row].as_py() != zlib.crc32(found.data):
            raise ValueError(f"{found}: its unpacked copy in {self.folder} is damaged; remove that folder")
        return found

    def beside(self, i: int, kind: str, endings: Sequence[str]) -> Held | None:
        """Returns the mask or the condition of row i; None without one."""
        name = getattr(self.columns, kind)
        if not name:
            return None
        block, row = self.block(i)
        data = cell(block.column(name), row)
        return Held(f"{self.where(i)}, its {name}", data) if data else None

    def holds(self, kind: str, endings: Sequence[str]) -> bool:
        """Returns whether the files have a column of this kind, "mask" or "condition"."""
        return bool(getattr(self.columns, kind))

    def texts(self, i: int) -> Sequence[str]:
        """Returns the captions of row i."""
        return () if self.captions is None else said_texts(self.captions[i])

    def bare(self) -> tuple[int, str]:
        """Returns (how many rows have no caption, where the first of them is)."""
        return (len(self), self.where(0)) if self.captions is None else tables.bare(self.captions, self.where)

    def shapes(self) -> np.ndarray:
        """Returns (height, width) of all pictures, int [rows 2]; the first call reads every picture's header."""
        starts = [0, *self.ends[:-1].tolist()]
        found = []
        for k, file in enumerate(self.files):
            key = ["shapes", 1, file.path, file.size, file.stamp, self.columns.picture]
            numbers = range(starts[k], int(self.ends[k]))
            found.append(tables.kept(self.folder, key, lambda numbers=numbers: self._shapes(numbers)))
        return np.stack([tables.Column(found, name).numbers() for name in ("height", "width")], 1)

    def _shapes(self, numbers):
        arrow = tables.arrow()
        schema = arrow.schema([("height", arrow.int32()), ("width", arrow.int32())])
        bar = tqdm(numbers, "sizes", unit="picture", dynamic_ncols=True, delay=2)
        rows = np.fromiter((side for i in bar for side in reading.shape(self.picture(i))), np.int32).reshape(-1, 2)
        for start in range(0, max(len(rows), 1), BATCH):
            part = rows[start : start + BATCH]
            yield arrow.record_batch([arrow.array(part[:, 0].copy()), arrow.array(part[:, 1].copy())], schema=schema)

    def content(self, i: int) -> str:
        """Returns a text with the file's path, size and stamp, and the row."""
        k, place = tables.located(self.ends, i)
        return json.dumps([*self._state(self.files[k]), self.columns.picture, place])

    def _state(self, file):
        return [file.path, file.size, file.stamp]

    def fingerprint(self) -> list[Any]:
        """Returns what decides the pictures."""
        state = json.dumps([self._state(file) for file in self.files])
        return [self.kind, len(self), self.columns.picture, hashlib.sha256(state.encode()).hexdigest()[:16]]

    def about(self) -> str:
        """Returns "12 parquet files"."""
        return f"{len(self.files)} {self.kind} file{'s' * (len(self.files) > 1)}"
