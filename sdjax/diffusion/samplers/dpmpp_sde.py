"""DPM++ SDE: DPM-Solver++ with two evaluations per step for the reverse SDE."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import BASE, NOISE, M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.diffusion.samplers.sigma_steps import ancestral, between, exponential


def dpmpp_sde(path: Path, eta: float) -> Iterator[Row]:
    """Solves the reverse SDE by DPM-Solver++(2S), with noise also at the middle of the step: DPM++ SDE.

    The step's noise is the increment of one Brownian motion in sigma: BASE carries the increment of the first half, the
    second row adds the second.
    Source: k-diffusion's sample_dpmpp_sde, r = 1/2; Lu et al. 2022b, algorithm 1, for the drift.
    """
    for i, here, there in path.moves():
        if not there.s:
            yield Row(here, i, there.a * M[0])
            continue
        middle = between(path, np.sqrt(here.sigma * there.sigma))
        down, up = ancestral(here.sigma, middle.sigma, eta)
        x = exponential(X / here.a, M[0], here.sigma, down) + up * NOISE
        down, up = ancestral(here.sigma, there.sigma, eta)
        first = np.sqrt((here.sigma - middle.sigma) / (here.sigma - there.sigma))
        second = np.sqrt(1 - first**2)
        carried = up * first * here.sigma / down * here.a if down else 0.0  # BASE is scaled by down / sigma / a below
        yield Row(here, i, middle.a * x, base=X + carried * NOISE)
        x = exponential(BASE / here.a, M[0], here.sigma, down)
        yield Row(middle, i, there.a * (x + up * second * NOISE))


DPMPP_SDE = Sampler("dpmpp_sde", "DPM++ SDE", dpmpp_sde, "sigmas", eta=1.0, automatic="karras")
