"""The rows of a table as examples, for tar shards, parquet and Arrow files.

A source provides a Table; Rows applies a run's Data settings to its pictures and prompts.  Memory does not grow with
the table: values are read when a row is needed.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sdjax.data import prompts
from sdjax.data.sources.pictures import Pictures
from sdjax.data.sources.source import Examples, Size, Source
from sdjax.images import reading
from sdjax.images.reading import Held, HeldItem
from sdjax.settings import SettingError

CHECKED = 16  # pictures, evenly over the rows, decoded by the check before a model is loaded
MOST_BYTES = 1 << 28  # most bytes of a picture's file


class Table(Protocol):
    """Pictures with texts in rows from 0 on.

    remote: whether a row comes over a network.
    """

    remote: bool

    def __len__(self) -> int: ...

    def picture(self, i: int) -> Held:
        """Returns the bytes of row i's picture.  Raises ValueError naming file and row."""
        ...

    def beside(self, i: int, kind: str, endings: Sequence[str]) -> Held | None:
        """Returns row i's "mask" or "condition" (`kind`), a file with one of these endings; None without one."""
        ...

    def holds(self, kind: str, endings: Sequence[str]) -> bool:
        """Returns whether row 0 has such a file."""
        ...

    def texts(self, i: int) -> Sequence[str]:
        """Returns the captions of row i; an example takes one of them."""
        ...

    def bare(self) -> tuple[int, str]:
        """Returns (how many rows have no caption, where the first of them is)."""
        ...

    def shapes(self) -> np.ndarray:
        """Returns (height, width) of all pictures, upright, int [rows 2]."""
        ...

    def content(self, i: int) -> str:
        """Returns a text that identifies the picture of row i, without reading it."""
        ...

    def fingerprint(self) -> list[Any]:
        """Returns plain values that identify all pictures."""
        ...

    def about(self) -> str:
        """Returns a short description of the files: "12 tar shards"."""
        ...


class Rows(Examples):
    """The examples of a Table.

    source: the source that opened the table; other processes open it again.  lacks: advice in the message for a row
    without a caption.
    Raises SettingError for settings that only folders have, and for masks or conditions that the table lacks;
    ValueError for rows without a caption if prompts need one.
    """

    def __init__(self, source: Source, data: Any, table: Table, lacks: str) -> None:
        if data.words:
            raise SettingError("words", data.words, f"() for data.path={data.path!r}; there are no sub-folders")
        self.source, self.data = source, data
        self.table, self.remote = table, table.remote
        self.prompts = prompts.make(data.templates, data.word)
        count, first = (0, "") if data.word else table.bare()
        if count and any(prompts.CAPTION in template for template in self.prompts.templates):
            raise ValueError(
                f"{first} ({count} of {len(self)} rows): no caption; {lacks}, set data.word or data.templates=none"
            )
        self.endings: Sequence[str] = () if data.maker is None else data.maker.endings
        filed = bool(self.endings)
        self.masked = data.mask
        for kind, wanted, endings in (
            ("mask", self.masked, reading.MASK_ENDINGS),
            ("condition", filed, self.endings),
        ):
            if wanted and not table.holds(kind, endings):
                raise SettingError(kind, getattr(data, kind), f"rows that hold a {kind}", f"{data.path!r} has none")
        self.pictures = Pictures(data, len(self), self._item, self._condition if filed else None)

    def __reduce__(self) -> tuple:
        return self.source.open, (self.data,)

    def _item(self, i):
        mask = self.table.beside(i, "mask", reading.MASK_ENDINGS) if self.masked else None
        return HeldItem(self.table.picture(i), mask)

    def _condition(self, i):
        found = self.table.beside(i, "condition", self.endings)
        if found is None:
            raise ValueError(f"{self.table.picture(i)}: no file of its condition; expected {self.endings[0]}")
        return found

    def __len__(self) -> int:
        return len(self.table)

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i, upright."""
        return self.pictures.shape(i)

    def shapes(self) -> np.ndarray:
        """Returns (height, width) of all pictures, upright, int [N 2]."""
        return self.table.shapes()

    def picture(self, i: int, size: Size) -> np.ndarray:
        """Returns the central crop of picture i, uint8 [h w 3]."""
        return self.view(i, size)["picture"]

    def view(self, i: int, size: Size, mirrored: bool = False) -> dict[str, Any]:
        """Returns the central crop of picture i with the mask and condition that the run reads, mirrored or not."""
        return self.pictures.view(i, size, mirrored)

    def caption(self, i: int, random: np.random.Generator) -> str:
        """Returns a prompt for picture i, from one of its captions with equal probability."""
        texts = self.table.texts(i)
        place = int(random.integers(len(texts))) if len(texts) > 1 else 0
        return self.prompts(texts[place] if len(texts) else "", random)

    def other(self, i: int, random: np.random.Generator) -> int:
        """Returns i: rows name no subjects."""
        return i

    def example(self, i: int, size: Size, random: np.random.Generator) -> dict[str, Any]:
        """Returns {"picture", "caption"} of picture i; also "mask" and "condition" if the run reads them."""
        return {**self.pictures.example(i, size, random), "caption": self.caption(i, random)}

    def check(self, size: int) -> None:
        """Decodes CHECKED pictures, evenly over the rows."""
        for i in sorted(set(np.linspace(0, len(self) - 1, CHECKED, dtype=int).tolist())):
            self.pictures.check(i, size)

    def content(self, i: int) -> str:
        """Returns a text that identifies picture i."""
        return self.table.content(i)

    def fingerprint(self) -> list[Any]:
        """Returns plain values that identify all pictures."""
        return self.table.fingerprint()

    def about(self) -> str:
        """Returns a short summary: "1000000 pictures in 12 parquet files"."""
        return f"{len(self)} picture{'s' * (len(self) > 1)} in {self.table.about()}"


def held(name: str, data: bytes | None) -> Held:
    """Returns a picture's bytes with their place.  Raises ValueError for missing bytes and for more than MOST_BYTES."""
    if not data:
        raise ValueError(f"{name}: no picture")
    if len(data) > MOST_BYTES:
        raise ValueError(f"{name}: a picture of {len(data)} bytes; expected at most {MOST_BYTES}")
    return Held(name, data)


def said_texts(value: Any) -> list[str]:
    """Returns the captions of a cell, a text or a list of texts: each on one line, without empty ones."""
    values = value if isinstance(value, list) else [value]
    return [line for text in values if isinstance(text, str) and (line := " ".join(text.split()))]
