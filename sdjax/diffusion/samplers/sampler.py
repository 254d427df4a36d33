"""What a sampler is: how the rows of a run are made, and how it is run.

MINE = Sampler("mine", "Mine", rows, "sigmas")          # in a file of this package; `known` finds it

def rows(path: Path, eta: float) -> Iterator[Row]: ...  # one row per evaluation of the network, see row.py
"""

import dataclasses
from collections.abc import Callable, Iterator

from sdjax.diffusion.samplers.row import Row


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a sampler is run.

    name: ours.  word: A1111's.
    rows: rows(path, eta), and where `churn` is set rows(path, eta, churn).  `here` and `there` in them are the levels
    that a step leads from and to.
    eta: the default amount of fresh noise; None where the method has none to set.
    output: what M[0] is, see row.outputs.  grid, end: see sigmas.levels.
    automatic: the noise schedule that A1111 takes for it, with or without `discard`, on k-diffusion's grid; None where
    it has the sampler not from there, for "normal" on its own grid.
    churn: whether its steps may begin with noise, see steps.raised.
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
