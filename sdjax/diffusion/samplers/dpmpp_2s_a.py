"""DPM++ 2S ancestral: DPM-Solver++ with two evaluations per step, and noise."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import BASE, NOISE, M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.diffusion.samplers.sigma_steps import ancestral, between, exponential


def dpmpp_2s(path: Path, eta: float) -> Iterator[Row]:
    """Steps to sigma_down by DPM-Solver++(2S), then adds noise: DPM++ 2S ancestral.

    Source: Lu et al. 2022b, algorithm 1 with r = 1/2.
    """
    for i, here, there in path.moves():
        down, up = ancestral(here.sigma, there.sigma, eta)
        if down == 0:
            yield Row(here, i, there.a * M[0])
            continue
        middle = between(path, np.sqrt(here.sigma * down))
        yield Row(here, i, middle.a * exponential(X / here.a, M[0], here.sigma, middle.sigma), base=X)
        x = exponential(BASE / here.a, M[0], here.sigma, down)
        yield Row(middle, i, there.a * (x + up * NOISE))


DPMPP_2S_A = Sampler("dpmpp_2s_a", "DPM++ 2S a", dpmpp_2s, "sigmas", eta=1.0, automatic="karras")
