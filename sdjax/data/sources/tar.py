"""Tar shards in WebDataset's layout as a source, local or in a bucket; an index gives random access.

    data.path=photos/train-{0000..0099}.tar        data.path=s3://bucket/photos        data.path=photos/a.tar

Consecutive members with the same path up to the first "." of the name are one example: 0001.jpg, 0001.txt,
0001.mask.png.  The caption is in .txt, else .caption, else in .json under "caption" or "text".

A shard is read once, from front to back, for its index (tables.py): place, size, SHA-256 and caption of each picture.
After that, a picture is one read of its bytes, checked against the SHA-256, so each process reads only its own rows.  A
shard that has changed gets a new index.

Source of the layout: WebDataset's documentation, "the WebDataset format".
"""

import concurrent.futures
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sdjax.data import places, splits, tables
from sdjax.data.places import File
from sdjax.data.sources.rows import MOST_BYTES, Rows, held, said_texts
from sdjax.data.sources.source import Examples, Source
from sdjax.images import captions, reading
from sdjax.images.reading import Held

ENDINGS = (".tar",)
TEXTS = ("txt", "caption", "json")  # an example's first one of these is its caption
SHARDS = 4  # shards indexed at once
BATCH = 4096  # rows per record batch of an index
BLOCK = 512  # bytes of a tar block


@dataclass(frozen=True)
class TarShards(Source):
    """Tar shards with one example per name: 0001.jpg, 0001.txt (WebDataset).

    index: folder that keeps the indexes; "" is ~/.cache/sdjax/data.
    """

    index: str = ""

    def matches(self, path: str) -> bool:
        """Returns whether a path names tar files, or a folder with tar files and no pictures."""
        return splits.matches(path, ENDINGS)

    def open(self, data: Any) -> Examples:
        """Returns the examples of the shards; creates missing indexes.

        Raises ValueError naming a shard that is missing, damaged, compressed or without pictures.
        """
        files = splits.files(data.path, ENDINGS)
        folder = tables.folder(self.index)
        return Rows(self, data, Shards(files, indexed(files, folder)), "add a .txt to its example")


class Shards:
    """The examples of tar shards.  indexes: one pyarrow.Table per shard."""

    def __init__(self, files: Sequence[File], indexes: Sequence[Any]) -> None:
        self.files, self.remote = files, places.remote(files[0].path)
        self.ends = np.cumsum([len(index) for index in indexes], dtype=np.int64)
        names = ("name", "start", "size", "sum", "caption", "beside", "height", "width")
        self.columns = {name: tables.Column(indexes, name) for name in names}
        if not len(self):
            raise ValueError(f"{files[0].path}: no pictures; {reading.ACCEPTED} in the shard")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, i: int) -> str:
        """Returns the shard and the member of row i, for messages."""
        k, place = tables.located(self.ends, i)
        return f"{self.files[k].path}, row {place + 1} ({self.columns['name'][i]})"

    def picture(self, i: int) -> Held:
        """Returns the picture of row i.  Raises ValueError naming a shard that changed since it was indexed."""
        data = self._read(i, self.columns["start"][i], self.columns["size"][i])
        if hashlib.sha256(data).digest() != self.columns["sum"][i]:
            raise ValueError(f"{self.where(i)}: not the bytes that were indexed; the shard is damaged or has changed")
        return held(self.where(i), data)

    def _read(self, i, start, size):
        return self.files[tables.located(self.ends, i)[0]].read(start, size)

    def beside(self, i: int, kind: str, endings: Sequence[str]) -> Held | None:
        """Returns the first member of row i with one of these endings; None without one."""
        members = {member["ending"]: member for member in self.columns["beside"][i]}
        for ending in endings:
            if member := members.get(ending.lstrip(".")):
                return Held(f"{self.where(i)}, its {ending}", self._read(i, member["start"], member["size"]))
        return None

    def holds(self, kind: str, endings: Sequence[str]) -> bool:
        """Returns whether row 0 has a member with one of these endings."""
        return self.beside(0, kind, endings) is not None

    def texts(self, i: int) -> Sequence[str]:
        """Returns the captions of row i."""
        return self.columns["caption"][i]

    def bare(self) -> tuple[int, str]:
        """Returns (how many rows have no caption, where the first of them is)."""
        return tables.bare(self.columns["caption"], self.where)

    def shapes(self) -> np.ndarray:
        """Returns (height, width) of all pictures, int [rows 2]."""
        return np.stack([self.columns["height"].numbers(), self.columns["width"].numbers()], 1)

    def content(self, i: int) -> str:
        """Returns the picture's digest, the same as a folder's for the same bytes, so they share cache entries."""
        return hashlib.sha256(self.columns["sum"][i]).hexdigest()[:16]

    def fingerprint(self) -> list[Any]:
        """Returns plain values that identify all pictures."""
        total = hashlib.sha256()
        for chunk in self.columns["sum"].chunks:
            total.update(chunk.buffers()[1][chunk.offset * 32 : (chunk.offset + len(chunk)) * 32])
        return ["tar", len(self), total.hexdigest()[:16]]

    def about(self) -> str:
        """Returns a short description: "12 tar shards"."""
        return f"{len(self.files)} tar shard{'s' * (len(self.files) > 1)}"


def indexed(files: Sequence[File], folder: Path) -> list[Any]:
    """Returns the index of each shard, a pyarrow.Table; creates missing indexes, SHARDS at a time.

    Each process starts at another shard, so that processes with one folder share the work.
    """
    turn = zlib.crc32(f"{os.uname().nodename} {os.getpid()}".encode()) % len(files)
    order = [*range(turn, len(files)), *range(turn)]

    def one(k):
        file = files[k]
        return tables.kept(folder, ["tar", 1, file.path, file.size, file.stamp], lambda: _index(file))

    pool = concurrent.futures.ThreadPoolExecutor(SHARDS)
    try:
        made = tqdm(pool.map(one, order), "shards", len(order), unit="shard", dynamic_ncols=True, delay=2)
        found = dict(zip(order, made, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    return [found[k] for k in range(len(files))]


def schema() -> Any:
    """Returns the pyarrow schema of an index."""
    arrow = tables.arrow()
    place = [("start", arrow.int64()), ("size", arrow.int64())]
    inner = arrow.struct([("ending", arrow.string()), *place])
    return arrow.schema([
        ("name", arrow.string()), *place, ("sum", arrow.binary(32)), ("height", arrow.int32()),
        ("width", arrow.int32()), ("caption", arrow.list_(arrow.string())), ("beside", arrow.list_(inner)),
    ])  # fmt: skip


def _index(file: File) -> Iterator[Any]:
    """Yields the record batches of a shard's index."""
    arrow, rows = tables.arrow(), []
    for row in _rows(file):
        rows.append(row)
        if len(rows) == BATCH:
            yield arrow.RecordBatch.from_pylist(rows, schema())
            rows = []
    yield arrow.RecordBatch.from_pylist(rows, schema())


def _rows(file):
    """Yields {column: value} of each example with a picture."""
    name, members = None, {}
    with file.open() as stream:
        for path, member in _members(file, stream):
            folder, _, last = path.rpartition("/")
            own, _, ending = last.partition(".")
            ending = ending.lower()
            if not own or not ending:
                continue
            if (folder, own) != name:
                yield from _row(file, members)
                name, members = (folder, own), {}
            if ending in members:
                raise ValueError(f"{file.path}, {path}: twice in its example")
            members[ending] = path, member.offset_data, member.size, _data(file, stream, path, member, ending)
        yield from _row(file, members)


def _members(file: File, stream: Any) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yields (path, tarfile.TarInfo) of the regular files of a shard.

    tarfile takes damage for the end of the archive.  So this checks that at least one block follows the last member,
    and only zeros.  Raises ValueError for a damaged or compressed shard.
    """
    opened: Any = tarfile.open
    try:
        with opened(fileobj=stream, mode="r:") as shard:
            while (member := shard.next()) is not None:
                shard.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep them all
                if member.isreg():
                    if member.offset_data + member.size > file.size:
                        raise ValueError(f"{file.path}, {member.name}: cut short")
                    yield member.name.removeprefix("./"), member
            end = shard.offset
    except tarfile.TarError as error:
        raise ValueError(f"{file.path}: not a whole, plain .tar ({error}); unpack one that is compressed") from None
    stream.seek(end)
    blocks = iter(lambda: stream.read(1 << 20), b"")
    if file.size < end + BLOCK or any(block.strip(b"\0") for block in blocks):
        raise ValueError(f"{file.path}: damaged, cut short or followed by another archive at byte {end}")


def _data(file, stream, path, member, ending):
    """Returns the bytes of a picture or a text; None for other members, which are read when needed."""
    most = MOST_BYTES if f".{ending}" in reading.SUFFIXES else captions.MAX_BYTES if ending in TEXTS else 0
    if not most:
        return None
    if member.size > most:
        raise ValueError(f"{file.path}, {path}: longer than {most} bytes")
    stream.seek(member.offset_data)
    return stream.read(member.size)


def _row(file, members):
    """Yields the row of an example; nothing for an example without a picture.

    members: {ending: (path, start, size, bytes)}.
    """
    pictures = [ending for ending in members if f".{ending}" in reading.SUFFIXES]
    if not pictures:
        return
    if len(pictures) > 1:
        raise ValueError(f"{file.path}, {members[pictures[1]][0]}: a second picture of its example")
    path, start, size, data = members[pictures[0]]
    height, width = reading.shape(Held(f"{file.path}, {path}", data))
    text = next((ending for ending in TEXTS if ending in members), None)
    others = {ending: place for ending, place in members.items() if ending not in (*pictures, *TEXTS)}
    yield {
        "name": path, "start": start, "size": size, "sum": hashlib.sha256(data).digest(),
        "height": height, "width": width,
        "caption": [] if text is None else _texts(file, members[text][0], text, members[text][3]),
        "beside": [{"ending": ending, "start": place[1], "size": place[2]} for ending, place in others.items()],
    }  # fmt: skip


def _texts(file, path, ending, data):
    """Returns the captions in a member's bytes."""
    try:
        text = data.decode("utf-8-sig")
        if ending != "json":
            return said_texts(text)
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{file.path}, {path}: not UTF-8 text{' of JSON' * (ending == 'json')}") from None
    return said_texts(value.get("caption", value.get("text"))) if isinstance(value, dict) else []
