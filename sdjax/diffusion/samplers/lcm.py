"""LCM: for models distilled into a consistency function."""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import NOISE, M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler


def lcm(path: Path, eta: float) -> Iterator[Row]:
    """Steps to a' f + s' noise, with the consistency function f = c_skip x + c_out x0; the last step returns f.

    Source: Luo et al. 2023 (LCM), algorithm 3 and equation 9; sigma_data = 0.5 and times scaled by 10 as in its code.
    """
    for i, here, there in path.moves():
        scaled = 10 * here.t
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        yield Row(here, i, there.a * (c_out * M[0] + c_skip * X) + there.s * NOISE)


LCM = Sampler("lcm", "LCM", lcm, "distilled", noisy=True)
