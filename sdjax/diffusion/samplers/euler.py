"""Euler and Euler ancestral: one slope per step."""

from collections.abc import Iterator

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import NOISE, M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.diffusion.samplers.sigma_steps import Churn, ancestral, raised


def euler(path: Path, eta: float, churn: Churn | None = None) -> Iterator[Row]:
    """Steps to x + (sigma_down - sigma) d, then adds noise.  eta 0: Euler; 1: Euler ancestral.  churn: see `raised`.

    Source: Karras et al. 2022, algorithm 2 without its correction.
    """
    for i, _, there in path.moves():
        here, (above, share) = raised(path, i, churn)[0], raised(path, i + 1, churn)
        down, up = ancestral(here.sigma, there.sigma, eta)
        x = X / here.a
        d = (x - M[0]) / here.sigma
        yield Row(here, i, above.a * (x + (down - here.sigma) * d + (up + share) * NOISE))


EULER = Sampler("euler", "Euler", euler, "sigmas", automatic="normal", churn=True)
EULER_A = Sampler("euler_a", "Euler a", euler, "sigmas", eta=1.0, automatic="normal")
