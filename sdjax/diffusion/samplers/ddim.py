"""DDIM: combines the clean latent and its noise at the next level."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import NOISE, M, Row, eps
from sdjax.diffusion.samplers.sampler import Sampler


def ddim(path: Path, eta: float) -> Iterator[Row]:
    """Steps to a' x0 + sqrt(s'² - std²) eps + std noise, with std = eta s'/s sqrt(1 - a²/a'²).

    eta: 0 deterministic, 1 as much noise as DDPM.  Source: Song et al. 2021 (DDIM), equations 12 and 16.
    """
    for i, here, there in path.moves():
        std = eta * there.s / here.s * np.sqrt(max(1 - (here.a / there.a) ** 2, 0))
        yield Row(here, i, there.a * M[0] + np.sqrt(max(there.s**2 - std**2, 0)) * eps(here) + std * NOISE)


DDIM = Sampler("ddim", "DDIM", ddim, "times", eta=0.0, end="file")
