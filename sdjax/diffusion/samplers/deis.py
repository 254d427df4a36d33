"""DEIS: integrates a line through the last two estimates of the noise."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler


def deis(path: Path, eta: float) -> Iterator[Row]:
    """Integrates the line through the last two eps in log sigma.  M: eps.

    Source: Zhang and Chen 2023 (DEIS), section 3.3, with polynomials in log rho and order 2, as in diffusers.
    """

    def integral(rho, one, other):  # of log(rho / other) / log(one / other)
        return rho * (np.log(rho / other) - 1) / np.log(one / other)

    for i, here, there in path.moves():
        if i == 0 or i == len(path.levels) - 1 and path.steps < 15:  # with fewer than 15 steps, the last has order 1
            change = (there.sigma - here.sigma) * M[0]
        else:
            old = path.levels[i - 1].sigma
            new_weight, old_weight = (
                integral(there.sigma, *pair) - integral(here.sigma, *pair)
                for pair in ((here.sigma, old), (old, here.sigma))
            )
            change = new_weight * M[0] + old_weight * M[1]
        yield Row(here, i, there.a * (X / here.a + change))


DEIS = Sampler("deis", "DEIS", deis, "intervals", output="eps", end="lowest")
