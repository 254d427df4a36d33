"""DDPM: a draw from the posterior of every step."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import NOISE, M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler


def ddpm(path: Path, eta: float) -> Iterator[Row]:
    """The posterior q(x' | x, x0) with its own ("small") variance, between any two levels.

    Source: Ho et al. 2020, equation 7; to a clean latent at the last step, without noise there (algorithm 2).
    """
    for i, here, there in path.moves():
        beta = 1 - (here.a / there.a) ** 2
        share = (there.s / here.s) ** 2  # (1 - alpha_bar') / (1 - alpha_bar)
        mean = there.a * beta / here.s**2 * M[0] + here.a / there.a * share * X
        yield Row(here, i, mean + np.sqrt(share * beta) * NOISE)


DDPM = Sampler("ddpm", "DDPM", ddpm, "times")
