"""The noise levels of a run, at which a sampler evaluates the network.

    for i, here, there in path.moves(): ...

A level is (t, a, s): the time for the network and the factors of signal and noise, with a² + s² = 1.  sigma = s / a is
k-diffusion's noise level, and lam = log(a / s) is DPM-Solver's.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np


class Level(NamedTuple):
    """A noise level; t is None only for CLEAN, which no network sees."""

    t: float
    a: float
    s: float

    @property
    def sigma(self) -> float:
        return self.s / self.a

    @property
    def lam(self) -> float:
        return np.log(self.a / self.s) if self.s else np.inf


CLEAN = Level(None, 1.0, 0.0)  # pyright: ignore[reportArgumentType]  # all others have a time


@dataclasses.dataclass(frozen=True)
class Path:
    """The levels of a run: step i leads from levels[i], which the network sees, to ends[i], usually levels[i + 1].

    steps: length of the whole path; levels and ends are shorter if image-to-image skips the first steps.
    scale: factor of unit-variance noise at the start of a run from pure noise.
    at: level of an integer training time.  time: the (fractional) time of a sigma.
    """

    levels: tuple[Level, ...]
    ends: tuple[Level, ...]
    steps: int
    scale: float
    at: Callable[[float], Level]
    time: Callable[[Any], Any]
    prediction_type: str

    def moves(self) -> Iterator[tuple[int, Level, Level]]:
        """Yields (i, here, there) of each step."""
        yield from zip(range(len(self.levels)), self.levels, self.ends, strict=True)

    def start(self, first: int) -> Self:
        """Returns the path without its first steps."""
        return dataclasses.replace(self, levels=self.levels[first:], ends=self.ends[first:])
