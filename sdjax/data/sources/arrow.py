"""Arrow files, which Hugging Face's datasets write to disk, as a source.

    dataset.save_to_disk("photos")          data.path=photos        data.path=photos#test, of a DatasetDict

The files are memory-mapped: opening them reads no rows, a row costs its own bytes, and nothing is copied.
Source of the layout: Hugging Face's datasets, Dataset.save_to_disk (state.json, data-00000-of-00001.arrow).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.data import places, splits, tables
from sdjax.data.places import File
from sdjax.data.sources import columns
from sdjax.data.sources.cells import Cells
from sdjax.data.sources.rows import Rows
from sdjax.data.sources.source import Examples, Source
from sdjax.formats.storage import files
from sdjax.settings import SettingError

ENDINGS = (".arrow",)
STATE = "state.json"  # in a folder that save_to_disk wrote


@dataclass(frozen=True)
class ArrowFiles(Source):
    """A data set that Hugging Face's datasets saved to this machine's disk.

    image_column, caption_column: names of the columns; "" finds them.
    index: folder that keeps the pictures' sizes for data.buckets; "" is ~/.cache/sdjax/data.
    """

    image_column: str = ""
    caption_column: str = ""
    index: str = ""

    def matches(self, path: str) -> bool:
        """Returns whether a path names Arrow files, or a folder with Arrow files and no pictures."""
        return splits.matches(path, ENDINGS)

    def open(self, data: Any) -> Examples:
        """Returns the examples in the files of the path's split.

        Raises SettingError for files in a bucket and for missing columns, ValueError naming a damaged file.
        """
        if places.remote(data.path):
            raise SettingError("path", data.path, "Arrow files on this machine's disk; of a bucket, parquet or tar")
        shards = [file for file in splits.files(data.path, ENDINGS) if _named(Path(file.path))]
        opened = [_mapped(file) for file in shards]
        chosen = columns.find(opened[0].schema, shards[0].path, self.image_column, self.caption_column)
        for file, one in zip(shards, opened, strict=True):
            columns.same(one.schema, chosen, file.path)
        folder = tables.folder(self.index)
        captions = tables.Column(opened, chosen.caption) if chosen.caption else None
        counts = [len(one) for one in opened]
        cells = Cells(shards, counts, chosen, RecordBatches(opened).block, captions, "Arrow", folder)
        return Rows(self, data, cells, "fill its cell")


class RecordBatches:
    """The record batches of several tables."""

    def __init__(self, opened: Sequence[Any]) -> None:
        self.batches = [batch for one in opened for batch in one.to_batches() if len(batch)]
        self.ends = np.cumsum([len(batch) for batch in self.batches], dtype=np.int64)

    def block(self, i: int) -> tuple[Any, int]:
        """Returns (the record batch of row i, the row's place in it)."""
        k, place = tables.located(self.ends, i)
        return self.batches[k], place


def _named(path: Path) -> bool:
    """Returns whether the state.json in a file's folder lists the file; True without a state.json.

    Raises ValueError for a data set whose rows are selected by a file of indices.
    """
    state = path.parent / STATE
    if not state.is_file():
        return True
    said = files.read_json(state)
    if said.get("_indices_data_files"):
        raise ValueError(f"{state}: rows chosen by indices; write them with dataset.flatten_indices() first")
    try:
        return path.name in [entry["filename"] for entry in said["_data_files"]]
    except (KeyError, TypeError):
        raise ValueError(f"{state}: no _data_files; expected what Dataset.save_to_disk writes") from None


def _mapped(file: File) -> Any:
    """Returns the pyarrow.Table of an Arrow file, memory-mapped; in stream format (datasets writes it) or file format.

    Raises ValueError for a damaged file.
    """
    arrow = tables.arrow()
    with places.said(file.path), arrow.memory_map(file.path) as mapped:
        whole = mapped.read_buffer()
    with places.said(file.path):
        is_file = whole[:6].to_pybytes() == b"ARROW1"
        opened = arrow.ipc.open_file if is_file else arrow.ipc.open_stream
        try:
            return opened(arrow.BufferReader(whole)).read_all()
        except arrow.ArrowException as error:
            raise ValueError(f"{file.path}: damaged or cut short: {str(error).splitlines()[0][:200]}") from None
