"""DPM++ 3M SDE: the clean latent extrapolated from the last three."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.diffusion.samplers.sigma_steps import reverse_sde


def dpmpp_3m(path: Path, eta: float) -> Iterator[Row]:
    """Solves the SDE of DPM++ 2M SDE with the last three x0: DPM++ 3M SDE.

    `curve` is half of the second derivative, but phi_3 would need all of it.  All implementations use this formula;
    without noise its order is 2 (measured).
    Source: Katherine Crowson's k-diffusion, sample_dpmpp_3m_sde.
    """
    for i, here, there in path.moves():
        h = there.lam - here.lam
        change = np.zeros_like(X)
        if i and there.s:
            phi_2 = 1 + np.expm1(-(1 + eta) * h) / ((1 + eta) * h)
            phi_3 = phi_2 / ((1 + eta) * h) - 0.5
            lams = [here.lam, *(path.levels[i - k].lam for k in range(1, min(i, 2) + 1))]
            r, *older = (-np.diff(lams) / h).tolist()
            d = (M[0] - M[1]) / r
            change = phi_2 * d
            if older:
                d_old = (M[1] - M[2]) / older[0]
                curve = (d - d_old) / (r + older[0])
                change = phi_2 * (d + r * curve) - phi_3 * curve
        yield Row(here, i, reverse_sde(here, there, h, eta) + there.a * (change - np.expm1(-(1 + eta) * h) * M[0]))


DPMPP_3M_SDE = Sampler(
    "dpmpp_3m_sde", "DPM++ 3M SDE", dpmpp_3m, "intervals", eta=1.0, automatic="exponential", discard=True
)
