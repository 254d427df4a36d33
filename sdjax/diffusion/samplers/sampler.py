"""The interface of a sampler: a function that yields the rows of a run, and the settings for running them.

MINE = Sampler("mine", "Mine", rows, "sigmas")          # in a file of this package; `known` finds it

def rows(path: Path, eta: float) -> Iterator[Row]: ...  # one row per evaluation of the network, see row.py
"""

import dataclasses
from collections.abc import Callable, Iterator

from sdjax.diffusion.samplers.row import Row


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler.

    name: sdjax's name.  word: A1111's name.
    rows: rows(path, eta), or rows(path, eta, churn) with `churn`.  In them, `here` and `there` are the levels before
    and after a step.
    eta: the default amount of fresh noise; None if the method has no such setting.
    output: the meaning of M[0], see row.outputs.  grid, end: see sigmas.levels.
    automatic: A1111's choice of spacing, on k-diffusion's grid, with or without `discard`.  None for samplers that
    A1111 does not take from k-diffusion; they use "normal" on their own grid.
    churn: whether steps may first add noise, see sigma_steps.raised.
    noisy: whether it draws fresh noise although it has no `eta`.
    """

    name: str
    word: str
    rows: Callable[..., Iterator[Row]]
    grid: str
    eta: float | None = None
    output: str = "x0"
    end: str = "clean"
    automatic: str | None = None
    discard: bool = False
    churn: bool = False
    noisy: bool = False

    @property
    def fresh(self) -> bool:
        """Whether it draws fresh noise unless settings say otherwise."""
        return self.noisy or bool(self.eta)
