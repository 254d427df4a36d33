"""DPM++ 2M and DPM++ 2M SDE: the clean latent extrapolated from the last two."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import M, Row
from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.diffusion.samplers.sigma_steps import reverse_sde


def dpmpp_2m(path: Path, eta: float) -> Iterator[Row]:
    """Extrapolates x0 to the middle of the step from the last two: DPM-Solver++(2M), and its SDE if eta is above 0.

    Source: Lu et al. 2022b, algorithm 2 (eta 0); equation of SDE-DPM-Solver++(2M), appendix (eta 1).
    """
    for i, here, there in path.moves():
        h = there.lam - here.lam
        x0 = M[0]
        if i and there.s:
            r = (here.lam - path.levels[i - 1].lam) / h
            x0 = M[0] + (M[0] - M[1]) / (2 * r)
        yield Row(here, i, reverse_sde(here, there, h, eta) - there.a * np.expm1(-(1 + eta) * h) * x0)


DPMPP_2M = Sampler("dpmpp_2m", "DPM++ 2M", dpmpp_2m, "intervals", automatic="karras")
DPMPP_2M_SDE = Sampler("dpmpp_2m_sde", "DPM++ 2M SDE", dpmpp_2m, "intervals", eta=1.0, automatic="exponential")
