"""Parquet files as a source, in the layout of Hugging Face's datasets; local, in a bucket, or on the hub.

    data.path=photos/train.parquet      data.path=s3://bucket/photos      data.path=hf://datasets/lambdalabs/naruto#train

columns.py finds the columns by type and name; data.image_column and data.caption_column name others.

The first run reads a file's captions into a memory-mapped table (tables.py), which later runs open in seconds, even for
a million rows.  A picture is read with its row group, since parquet compresses groups as a whole.  A group of more than
DIRECT bytes, or one in a bucket, is unpacked to a memory-mapped table at the first access to one of its rows.  This
copies the data to disk; later accesses read only a row's own bytes.
"""

import contextlib
import functools
import json
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.data import places, splits, tables
from sdjax.data.places import File
from sdjax.data.sources import columns
from sdjax.data.sources.cells import SUM, Cells
from sdjax.data.sources.columns import Columns
from sdjax.data.sources.rows import Rows
from sdjax.data.sources.source import Examples, Source

ENDINGS = (".parquet",)
DIRECT = 1 << 20  # most picture bytes of a local row group that is read directly, without an unpacked copy
GROUPS = 64  # row groups that stay open
FOOTERS = 64  # files whose footers stay in memory
BATCH = 65536  # captions per record batch
PICTURES = 64  # pictures per record batch of an unpacked group


@dataclass(frozen=True)
class Parquet(Source):
    """Parquet files with a column of pictures and one of captions, as in Hugging Face's datasets.

    image_column, caption_column: their names; "" finds them.
    index: folder that keeps captions, sizes and unpacked row groups; "" is ~/.cache/sdjax/data.
    """

    image_column: str = ""
    caption_column: str = ""
    index: str = ""

    def matches(self, path: str) -> bool:
        """Returns whether a path names parquet files, or a folder with parquet files and no pictures."""
        return splits.matches(path, ENDINGS)

    def open(self, data: Any) -> Examples:
        """Returns the examples in the files of the path's split.

        Raises SettingError for missing columns, ValueError naming an unreadable file.
        """
        files = splits.files(data.path, ENDINGS)
        with _said(files[0]), files[0].open() as stream:
            schema = _parquet().ParquetFile(stream).schema_arrow
        chosen = columns.find(schema, files[0].path, self.image_column, self.caption_column)
        folder = tables.folder(self.index)
        return Rows(self, data, table(files, chosen, folder), "fill its cell")


def table(files: Sequence[File], chosen: Columns, folder: Path) -> Cells:
    """Returns the rows of parquet files as a Table."""
    texts = [_texts(file, chosen, folder) for file in files]
    groups = Groups(files, [json.loads(text.schema.metadata[b"groups"]) for text in texts], chosen, folder)
    captions = tables.Column(texts, "caption") if chosen.caption else None
    return Cells(files, groups.counts, chosen, groups.block, captions, "parquet", folder)


def _texts(file, chosen, folder):
    """Returns the table of a file's captions, {"caption"}, with [rows, bytes] of each row group in its metadata."""
    key = ["parquet", 1, file.path, file.size, file.stamp, chosen.picture, chosen.caption]
    return tables.kept(folder, key, lambda: _read_texts(file, chosen))


def _read_texts(file, chosen) -> Iterator[Any]:
    arrow = tables.arrow()
    with _said(file), file.open() as stream:
        opened = _parquet().ParquetFile(stream)
        columns.same(opened.schema_arrow, chosen, file.path)
        groups = [opened.metadata.row_group(g) for g in range(opened.metadata.num_row_groups)]
        sizes = json.dumps([[group.num_rows, _bytes(group, chosen.picture)] for group in groups])
        kind = opened.schema_arrow.field(chosen.caption).type if chosen.caption else arrow.null()
        schema = arrow.schema([("caption", kind)], {"groups": sizes})
        batches = opened.iter_batches(BATCH, columns=[chosen.caption]) if chosen.caption else ()
        yield arrow.RecordBatch.from_arrays([arrow.array([], kind)], schema=schema)
        for batch in batches:
            yield arrow.RecordBatch.from_arrays([batch.column(0)], schema=schema)


def _bytes(group, name):
    """Returns the unpacked bytes of a column, with its nested columns, in a row group."""
    chunks = (group.column(k) for k in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == name)


class Groups:
    """The row groups of parquet files.  sizes: [[rows, bytes], ...] of each file's groups."""

    def __init__(self, files: Sequence[File], sizes: Sequence[list[list[int]]], chosen: Columns, folder: Path) -> None:
        self.files, self.chosen, self.folder = files, chosen, folder
        self.counts = [sum(rows for rows, _ in groups) for groups in sizes]
        flat = np.array([(k, g, *size) for k, groups in enumerate(sizes) for g, size in enumerate(groups)], np.int64)
        self.file, self.group, rows, self.bytes = flat.reshape(-1, 4).T
        self.ends = np.cumsum(rows)
        self.one = threading.Lock()  # unpacks a group only once, and one group at a time
        self._opened = functools.lru_cache(GROUPS)(self._open)
        self._footer = functools.lru_cache(FOOTERS)(self._read_footer)

    def block(self, i: int) -> tuple[Any, int]:
        """Returns (the pyarrow.Table of row i's group, the row's place in it)."""
        g, place = tables.located(self.ends, i)
        return self._opened(g), place

    def _open(self, g):
        file, group = self.files[int(self.file[g])], int(self.group[g])
        if self.bytes[g] <= DIRECT and not places.remote(file.path):
            with _said(file), self._parquet(file) as opened:
                return opened.read_row_group(group, columns=columns.leaves(opened.schema_arrow, self.chosen))
        names = [self.chosen.picture, self.chosen.mask, self.chosen.condition]
        key = ["parquet rows", 1, file.path, file.size, file.stamp, group, names]
        with self.one:
            return tables.kept(self.folder, key, lambda: self._unpacked(file, group), check=False)

    def _unpacked(self, file, group):
        with _said(file), self._parquet(file) as opened:
            leaves = columns.leaves(opened.schema_arrow, self.chosen)
            for batch in opened.iter_batches(PICTURES, row_groups=[group], columns=leaves):
                pictures = batch.column(self.chosen.picture)
                sums = [zlib.crc32(columns.cell(pictures, row) or b"") for row in range(len(batch))]
                yield batch.append_column(SUM, tables.arrow().array(sums, tables.arrow().uint32()))

    @contextlib.contextmanager
    def _parquet(self, file):
        footer = self._footer(file)
        with file.open() as stream:
            yield _parquet().ParquetFile(stream, metadata=footer, pre_buffer=places.remote(file.path))

    def _read_footer(self, file):
        with file.open() as stream:
            return _parquet().ParquetFile(stream).metadata


def _parquet():
    tables.arrow()
    from pyarrow import parquet

    return parquet


def _said(file):
    return places.said(file.path)
