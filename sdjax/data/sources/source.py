"""The interfaces of a source of pictures and of the examples that it opens.

examples = sources.open(Data(path="photos/cat", word="a sks cat"))
examples.example(0, 512, np.random.default_rng(7))         # {"picture" uint8 [512 512 3], "caption"[, "mask"]}
"""

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

Random = np.random.Generator
Size = int | tuple[int, int]  # of a crop: the side of a square, or (height, width)


class Examples(Protocol):
    """Pictures with captions, by number from 0; they can be pickled, for the processes of data.workers.

    size: of the crop to return, (height, width) or the side of a square.
    remote: whether pictures come over a network; then more threads read at once.
    """

    remote: bool = False

    def __len__(self) -> int: ...

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i in the source."""
        ...

    def picture(self, i: int, size: Size) -> np.ndarray:
        """Returns picture i without random augmentation, uint8 [h w 3]."""
        ...

    def caption(self, i: int, random: Random) -> str:
        """Returns a prompt for picture i."""
        ...

    def other(self, i: int, random: Random) -> int:
        """Returns the number of another picture of the same subject; i itself without one."""
        ...

    def example(self, i: int, size: Size, random: Random) -> dict[str, Any]:
        """Returns {"picture" uint8 [h w 3], "caption"} of picture i, with random augmentation.

        If the run asks for them, also "mask" float32 [h w] in [0, 1] and, for a condition from files, "condition" uint8
        [h w 3].
        """
        return {"picture": self.picture(i, size), "caption": self.caption(i, random)}

    def view(self, i: int, size: Size, mirrored: bool = False) -> dict[str, Any]:
        """Returns what `example` returns of picture i but the caption: its central crop, mirrored or not."""
        found = self.picture(i, size)
        return {"picture": np.ascontiguousarray(found[:, ::-1]) if mirrored else found}

    def shapes(self) -> np.ndarray:
        """Returns (height, width) of all pictures, int [N 2]."""
        return np.array([self.shape(i) for i in range(len(self))], np.int64).reshape(-1, 2)

    def epoch(self) -> Sequence[int] | np.ndarray:
        """Returns the numbers of an epoch's pictures; large sources return a range or an array."""
        return range(len(self))

    def fingerprint(self) -> list[Any]:
        """Returns plain values that identify all pictures."""
        ...

    def content(self, i: int) -> str:
        """Returns a text that identifies the content of picture i, independent of its number, as a cache's key."""
        return json.dumps([*self.fingerprint(), i])

    def check(self, size: int) -> None:
        """Raises ValueError naming an unusable picture; runs before a model is loaded."""

    def chosen(self) -> Sequence[int] | np.ndarray | None:
        """Returns the numbers of the pictures that the run uses; None for all."""
        return None

    def about(self) -> str:
        """Returns a short summary: "12 pictures, 10 captions"."""
        ...


class Source(Protocol):
    """A frozen dataclass with the settings of one kind of pictures, available as data.NAME (`data.count`).

    last: whether this source is asked after all others, because it takes any folder.
    square: whether all pictures are squares, in one size or several.
    """

    last: ClassVar[bool] = False
    square: ClassVar[bool] = False

    def matches(self, path: str) -> bool:
        """Returns whether a path, the `data.path` of a run, names pictures of this kind."""
        ...

    def open(self, data: Any) -> Examples:
        """Returns the examples for a run's Data settings (data/batches.py).

        Raises SettingError for settings that do not fit these pictures, ValueError for missing pictures.
        """
        ...


class Only(Examples):
    """A subset of the examples, by distinct numbers; takes 16 bytes per number."""

    def __init__(self, examples: Examples, numbers: Sequence[int] | np.ndarray) -> None:
        self.examples, self.numbers = examples, np.asarray(numbers, np.int64)
        self.remote, self._order = examples.remote, np.argsort(self.numbers, kind="stable")

    def _places(self, numbers):
        """Returns the places of the examples' numbers in this subset, -1 for numbers outside it."""
        numbers = np.asarray(numbers, np.int64)
        at = self._order[np.minimum(np.searchsorted(self.numbers, numbers, sorter=self._order), len(self) - 1)]
        return np.where(self.numbers[at] == numbers, at, -1)

    def _number(self, i):
        return int(self.numbers[i])

    def __len__(self) -> int:
        return len(self.numbers)

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i."""
        return self.examples.shape(self._number(i))

    def shapes(self) -> np.ndarray:
        """Returns (height, width) of all pictures of the subset, int [N 2]."""
        return self.examples.shapes()[self.numbers]

    def picture(self, i: int, size: Size) -> np.ndarray:
        """Returns picture i, uint8 [h w 3]."""
        return self.examples.picture(self._number(i), size)

    def view(self, i: int, size: Size, mirrored: bool = False) -> dict[str, Any]:
        """Returns the central crop of picture i with its mask and condition, mirrored or not."""
        return self.examples.view(self._number(i), size, mirrored)

    def caption(self, i: int, random: np.random.Generator) -> str:
        """Returns a caption of picture i."""
        return self.examples.caption(self._number(i), random)

    def other(self, i: int, random: np.random.Generator) -> int:
        """Returns the number of another picture of the same subject; i itself if that one is outside the subset."""
        place = int(self._places(self.examples.other(self._number(i), random)))
        return i if place < 0 else place

    def epoch(self) -> np.ndarray:
        """Returns the numbers of an epoch's pictures."""
        places = self._places(self.examples.epoch())
        return places[places >= 0]

    def example(self, i: int, size: Size, random: np.random.Generator) -> dict[str, Any]:
        """Returns {"picture", "caption", ...} of picture i."""
        return self.examples.example(self._number(i), size, random)

    def content(self, i: int) -> str:
        """Returns a text that identifies picture i."""
        return self.examples.content(self._number(i))

    def fingerprint(self) -> list[Any]:
        """Returns plain values that identify the pictures."""
        return [*self.examples.fingerprint(), self.numbers.tolist()]

    def about(self) -> str:
        """Returns a short summary."""
        return f"{len(self)} of {self.examples.about()}"
