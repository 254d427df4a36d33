"""UniPC: a predictor whose next output corrects its step."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import BASE, M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler


def unipc(path: Path, eta: float) -> Iterator[Row]:
    """UniPC of order 2 on x0, B(h) = exp(h) - 1 (bh2): each output first corrects the step that led to it.

    BASE: the corrected latent of the previous step.  M[0]: x0 at the predicted latent.
    Source: Zhao et al. 2023 (UniPC), algorithms 1 and 2, equations 3 and 9.
    """
    orders = [min(2, i + 1, len(path.levels) - i) for i in range(len(path.levels))]
    for i, here, there in path.moves():
        x = X
        if i:
            last = path.levels[i - 1]
            h = here.lam - last.lam
            slopes, rs = [M[0] - M[1]], [1.0]
            if orders[i - 1] == 2:
                rs.insert(0, (path.levels[i - 2].lam - last.lam) / h)
                slopes.insert(0, (M[2] - M[1]) / rs[0])
            x = _unipc_step(last, here, h, BASE, M[1], slopes, _unipc_weights(rs, h))
        h = there.lam - here.lam
        slopes = []
        if orders[i] == 2:
            slopes = [(M[1] - M[0]) / ((path.levels[i - 1].lam - here.lam) / h)]
        yield Row(here, i, _unipc_step(here, there, h, x, M[0], slopes, [0.5]), base=x)


def _unipc_step(here, there, h, x, x0, slopes, weights):
    change = sum((w * slope for w, slope in zip(weights, slopes, strict=False)), start=x0)
    return there.s / here.s * x - there.a * np.expm1(-h) * change


def _unipc_weights(rs, h):
    """Returns the weights rho_m of the slopes: sum_m r_m^(k-1) rho_m = k! phi_(k+1)(-h) (-h) / (exp(-h) - 1)."""
    if len(rs) == 1:
        return [0.5]
    phi, factorial, right = np.expm1(-h) / -h - 1, 1.0, []
    for k in range(1, len(rs) + 1):
        right.append(phi * factorial / np.expm1(-h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve([[r**k for r in rs] for k in range(len(rs))], right)


UNIPC = Sampler("unipc", "UniPC", unipc, "intervals")
