"""TCD: for models distilled along trajectories."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import NOISE, M, Row, eps
from sdjax.diffusion.samplers.sampler import Sampler


def tcd(path: Path, eta: float) -> Iterator[Row]:
    """Steps by DDIM to the time (1 - eta) t', then adds noise up to t'.  The last step leads to time 0 without noise.

    eta: the paper's gamma, 0 deterministic, 1 like LCM.  Source: Zheng et al. 2024 (TCD), algorithm 4.
    """
    for i, here, there in path.moves():
        lower = path.at(np.floor((1 - eta) * there.t))
        kept = there.a / lower.a
        yield Row(here, i, kept * (lower.a * M[0] + lower.s * eps(here)) + np.sqrt(max(1 - kept**2, 0)) * NOISE)


TCD = Sampler("tcd", "TCD", tcd, "distilled", eta=0.3, end="lowest")
