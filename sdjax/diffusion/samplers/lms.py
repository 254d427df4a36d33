"""LMS: Adams-Bashforth in sigma."""

from collections.abc import Iterator, Sequence

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler


def lms(path: Path, eta: float, order: int = 4) -> Iterator[Row]:
    """Integrates the polynomial through the last slopes in sigma (Adams-Bashforth).  M: eps.

    Source: Katherine Crowson's k-diffusion, sample_lms.
    """
    for i, here, there in path.moves():
        known = [path.levels[i - k].sigma - here.sigma for k in range(min(i + 1, order))]
        weights = _integrated_lagrange(known, there.sigma - here.sigma)
        yield Row(here, i, there.a * (X / here.a + sum(w * m for w, m in zip(weights, M, strict=False))))


def _integrated_lagrange(nodes: Sequence[float], stop: float) -> Iterator[float]:
    """Yields the integral from 0 to stop of each Lagrange polynomial of the nodes."""
    for k, node in enumerate(nodes):
        others = [other for j, other in enumerate(nodes) if j != k]
        yield np.poly1d(others, r=True).integ()(stop) / np.prod([node - other for other in others])


LMS = Sampler("lms", "LMS", lms, "sigmas", output="eps", automatic="normal")
