"""Heun: the mean of the slopes at both ends of a step."""

from collections.abc import Iterator

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import BASE, NOISE, M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.diffusion.samplers.sigma_steps import Churn, raised


def heun(path: Path, eta: float, churn: Churn | None = None) -> Iterator[Row]:
    """Uses the mean of the slopes at both ends of the step; a last step to sigma 0 is Euler's.  churn: see `raised`.

    Source: Karras et al. 2022, algorithm 2.
    """
    for i, _, there in path.moves():
        here, (above, share) = raised(path, i, churn)[0], raised(path, i + 1, churn)
        dt = there.sigma - here.sigma
        x = X / here.a
        d = (x - M[0]) / here.sigma
        yield Row(here, i, there.a * (x + dt * d), base=X)
        if there.s:
            x, d, d_next = BASE / here.a, (BASE / here.a - M[1]) / here.sigma, (X / there.a - M[0]) / there.sigma
            yield Row(there, i, above.a * (x + dt * (d + d_next) / 2 + share * NOISE))


HEUN = Sampler("heun", "Heun", heun, "sigmas", automatic="normal", churn=True)
