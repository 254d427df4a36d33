"""DDPM: draws from the posterior at every step."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import NOISE, M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler


def ddpm(path: Path, eta: float) -> Iterator[Row]:
    """Samples the posterior q(x' | x, x0) with its own ("small") variance, between any two levels.

    The last step leads to the clean latent and adds no noise (algorithm 2).  Source: Ho et al. 2020, equation 7.
    """
    for i, here, there in path.moves():
        beta = 1 - (here.a / there.a) ** 2
        share = (there.s / here.s) ** 2  # (1 - alpha_bar') / (1 - alpha_bar)
        mean = there.a * beta / here.s**2 * M[0] + here.a / there.a * share * X
        yield Row(here, i, mean + np.sqrt(share * beta) * NOISE)


DDPM = Sampler("ddpm", "DDPM", ddpm, "times", noisy=True)
