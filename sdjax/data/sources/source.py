"""What a source of pictures is, and what it opens: examples, by number.

examples = sources.open(Data(path="photos/cat", word="a sks cat"))
examples.example(0, 512, np.random.default_rng(7))         # {"picture" uint8 [512 512 3], "caption"[, "mask"]}
"""

import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Random = np.random.Generator
Size = int | tuple[int, int]  # of what is cut out of a picture: the side of a square, or (height, width)


class Examples(Protocol):
    """Pictures with words, by number from 0.  `size`: of what is cut out of a picture, of a square its one side."""

    def __len__(self) -> int: ...

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i as it is kept."""
        ...

    def picture(self, i: int, size: Size) -> np.ndarray:
        """Returns picture i without random augmentation, uint8 [h w 3]."""
        ...

    def caption(self, i: int, random: Random) -> str:
        """Returns a prompt for picture i."""
        ...

    def other(self, i: int, random: Random) -> int:
        """Returns the number of another picture of the same subject; i itself where there is none."""
        ...

    def example(self, i: int, size: Size, random: Random) -> dict[str, Any]:
        """Returns {"picture" uint8 [h w 3], "caption"} of picture i, and where the run asks for them "mask"
        float32 [h w] in [0, 1] and, of a condition that files hold, "condition" uint8 [h w 3].
        """
        return {"picture": self.picture(i, size), "caption": self.caption(i, random)}

    def epoch(self) -> Sequence[int]:
        """Returns the numbers of an epoch's pictures."""
        return range(len(self))

    def fingerprint(self) -> list[Any]:
        """Returns what decides the pictures, plain values."""
        ...

    def content(self, i: int) -> str:
        """Returns a digest of what decides picture i, whatever its number: for a cache."""
        return json.dumps([*self.fingerprint(), i])

    def check(self, size: int) -> None:
        """Raises ValueError, naming it, for a picture that is there and cannot be used; before a model is loaded."""

    def chosen(self) -> Sequence[int] | None:
        """Returns the numbers of those pictures that the run asks for, None for all."""
        return None

    def about(self) -> str:
        """Returns what was found, in a few words: "12 pictures, 10 captions"."""
        ...


class Source(Protocol):
    """A frozen dataclass of settings that only such pictures have; `data.NAME` finds them (`data.count`).

    square: whether all pictures are squares, in one size or several.
    """

    square = False

    def matches(self, path: str) -> bool:
        """Returns whether `data.path` names such pictures."""
        ...

    def open(self, data: Any) -> Examples:
        """Returns the examples that a run's Data settings (data/batches.py) name.

        Raises SettingError for settings that do not fit these pictures, ValueError for pictures that are not there.
        """
        ...


class Only(Examples):
    """Some of the examples, by number."""

    def __init__(self, examples: Examples, numbers: Sequence[int]) -> None:
        self.examples, self.numbers = examples, list(numbers)
        self.place = {number: i for i, number in enumerate(self.numbers)}

    def __len__(self) -> int:
        return len(self.numbers)

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i."""
        return self.examples.shape(self.numbers[i])

    def picture(self, i: int, size: Size) -> np.ndarray:
        """Returns picture i, uint8 [size size 3]."""
        return self.examples.picture(self.numbers[i], size)

    def caption(self, i: int, random: np.random.Generator) -> str:
        """Returns a caption of picture i."""
        return self.examples.caption(self.numbers[i], random)

    def other(self, i: int, random: np.random.Generator) -> int:
        """Returns the number of another picture of the same subject; i itself where that one is not among them."""
        return self.place.get(self.examples.other(self.numbers[i], random), i)

    def epoch(self) -> Sequence[int]:
        """Returns the numbers of an epoch's pictures."""
        return [self.place[number] for number in self.examples.epoch() if number in self.place]

    def example(self, i: int, size: Size, random: np.random.Generator) -> dict[str, Any]:
        """Returns {"picture", "caption", ...} of picture i."""
        return self.examples.example(self.numbers[i], size, random)

    def content(self, i: int) -> str:
        """Returns a digest of picture i."""
        return self.examples.content(self.numbers[i])

    def fingerprint(self) -> list[Any]:
        """Returns what decides the pictures."""
        return [*self.examples.fingerprint(), self.numbers]

    def about(self) -> str:
        """Returns what there is, in words."""
        return f"{len(self)} of {self.examples.about()}"
