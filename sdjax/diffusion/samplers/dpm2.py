"""DPM2 and DPM2 ancestral: the slope at the middle of a step."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import BASE, NOISE, M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.diffusion.samplers.sigma_steps import ancestral, between


def dpm2(path: Path, eta: float) -> Iterator[Row]:
    """Uses the slope at the middle of the step in log sigma.  eta 0: DPM2; 1: DPM2 ancestral.

    Source: Karras et al. 2022, algorithm 2 with DPM-Solver-2's midpoint (Lu et al. 2022a, algorithm 1).
    """
    for i, here, there in path.moves():
        down, up = ancestral(here.sigma, there.sigma, eta)
        x = X / here.a
        d = (x - M[0]) / here.sigma
        if down == 0:
            yield Row(here, i, there.a * (x + (down - here.sigma) * d))
            continue
        middle = between(path, np.sqrt(here.sigma * down))
        yield Row(here, i, middle.a * (x + (middle.sigma - here.sigma) * d), base=X)
        x, d = BASE / here.a, (X / middle.a - M[0]) / middle.sigma
        yield Row(middle, i, there.a * (x + (down - here.sigma) * d + up * NOISE))


DPM2 = Sampler("dpm2", "DPM2", dpm2, "sigmas_rounded", automatic="karras", discard=True)
DPM2_A = Sampler("dpm2_a", "DPM2 a", dpm2, "sigmas_rounded", eta=1.0, automatic="karras", discard=True)
