"""Samplers of discrete time: DDIM, DDPM, LCM, TCD.  Each yields one row per evaluation (see row.py).

`here` and `there` are the levels that a step leads from and to; M[0] is the clean latent x0 that the network sees.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

from sdjax.diffusion.samplers.row import NOISE, M, Row, X
from sdjax.diffusion.samplers.sigmas import Level, Path


def _eps(here: Level) -> Float64[np.ndarray, " registers"]:
    return (X - here.a * M[0]) / here.s


def ddim(path: Path, eta: float) -> Iterator[Row]:
    """a' x0 + sqrt(s'² - std²) eps + std noise, std = eta s'/s sqrt(1 - a²/a'²).

    eta: 0 deterministic, 1 as much noise as DDPM.  Source: Song et al. 2021 (DDIM), equations 12 and 16.
    """
    for i, here, there in path.moves():
        std = eta * there.s / here.s * np.sqrt(max(1 - (here.a / there.a) ** 2, 0))
        yield Row(here, i, there.a * M[0] + np.sqrt(max(there.s**2 - std**2, 0)) * _eps(here) + std * NOISE)


def ddpm(path: Path, eta: float) -> Iterator[Row]:
    """The posterior q(x' | x, x0) with its own ("small") variance, between any two levels.

    Source: Ho et al. 2020, equation 7; to a clean latent at the last step, without noise there (algorithm 2).
    """
    for i, here, there in path.moves():
        beta = 1 - (here.a / there.a) ** 2
        share = (there.s / here.s) ** 2  # (1 - alpha_bar') / (1 - alpha_bar)
        mean = there.a * beta / here.s**2 * M[0] + here.a / there.a * share * X
        yield Row(here, i, mean + np.sqrt(share * beta) * NOISE)


def lcm(path: Path, eta: float) -> Iterator[Row]:
    """The consistency function, and noise of the next level on top: a' f + s' noise; f itself at the end.

    f = c_skip x + c_out x0.  Source: Luo et al. 2023 (LCM), algorithm 3 and equation 9; sigma_data = 0.5 and times
    scaled by 10 as in its code.
    """
    for i, here, there in path.moves():
        scaled = 10 * here.t
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        yield Row(here, i, there.a * (c_out * M[0] + c_skip * X) + there.s * NOISE)


def tcd(path: Path, eta: float) -> Iterator[Row]:
    """DDIM to the time (1 - eta) t', then noise up to t'.  The last step leads to time 0, without noise.

    eta: the paper's gamma, 0 deterministic, 1 like LCM.  Source: Zheng et al. 2024 (TCD), algorithm 4.
    """
    for i, here, there in path.moves():
        lower = path.at(np.floor((1 - eta) * there.t))
        kept = there.a / lower.a
        yield Row(here, i, kept * (lower.a * M[0] + lower.s * _eps(here)) + np.sqrt(max(1 - kept**2, 0)) * NOISE)
