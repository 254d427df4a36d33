"""Samplers that forget: Euler, Heun, DPM2, DPM++ 2S and SDE, with or without fresh noise.  See row.py for the form.

Written in k-diffusion's variables: x / a is the latent of variance 1 + sigma², the ODE is dx/dsigma = (x - x0) / sigma.
A step of two evaluations yields two rows; the second finds the beginning of the step in BASE and its output in M[1].
"""

from collections.abc import Iterator

import numpy as np

from sdjax.diffusion.samplers.row import BASE, NOISE, M, Row, X
from sdjax.diffusion.samplers.sigmas import Level, Path

MOST_CHURN = np.sqrt(2) - 1  # of one step: Karras et al. 2022, algorithm 2
Churn = tuple[float, float, float, float]  # s_churn, s_tmin, s_tmax, s_noise of the source


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Returns (sigma_down, sigma_up): where the deterministic part goes, and the noise that leads back to sigma_next.

    Source: Song et al. 2021 (DDIM), equation 16, in sigmas; as k-diffusion writes it.
    """
    up = min(sigma_next, eta * sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2))
    return np.sqrt(sigma_next**2 - up**2), up


def between(path: Path, sigma: float) -> Level:
    """Returns the level of a sigma that is not on the path, at the fractional time that the model's table gives it."""
    return Level(float(path.time(sigma)), 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma))


def raised(path: Path, i: int, churn: Churn | None) -> tuple[Level, float]:
    """Returns (the noisier level from which step i starts, the share of NOISE that leads there, both in sigma).

    churn: (s_churn, s_tmin, s_tmax, s_noise) of the source, or None; the level itself and 0 behind the last step.
    Source: Karras et al. 2022, algorithm 2, lines 3 to 6; s_churn is divided by the steps of the run.
    """
    if i == len(path.levels):
        return path.ends[-1], 0.0
    here = path.levels[i]
    amount, low, high, noise = churn or (0.0, 0.0, np.inf, 1.0)
    if not amount or not low <= here.sigma <= high:
        return here, 0.0
    above = between(path, here.sigma * (1 + min(amount / len(path.levels), MOST_CHURN)))
    return above, noise * np.sqrt(above.sigma**2 - here.sigma**2)


def euler(path: Path, eta: float, churn: Churn | None = None) -> Iterator[Row]:
    """x + (sigma_down - sigma) d, and noise.  eta 0: Euler; 1: Euler ancestral.  churn: see `raised`.

    Source: Karras et al. 2022, algorithm 2 without its correction.
    """
    for i, _, there in path.moves():
        here, (above, share) = raised(path, i, churn)[0], raised(path, i + 1, churn)
        down, up = ancestral(here.sigma, there.sigma, eta)
        x = X / here.a
        d = (x - M[0]) / here.sigma
        yield Row(here, i, above.a * (x + (down - here.sigma) * d + (up + share) * NOISE))


def heun(path: Path, eta: float, churn: Churn | None = None) -> Iterator[Row]:
    """The mean of the slopes at both ends of the step; a last step to sigma 0 is Euler's.  churn: see `raised`.

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


def dpm2(path: Path, eta: float) -> Iterator[Row]:
    """The slope at the middle of the step in log sigma.  eta 0: DPM2; 1: DPM2 ancestral.

    Source: Karras et al. 2022, algorithm 2 with DPM-Solver-2's midpoint (Lu et al. 2022a, algorithm 1).
    """
    for i, here, there in path.moves():
        down, up = ancestral(here.sigma, there.sigma, eta)
        x = X / here.a
        d = (x - M[0]) / here.sigma
        if down == 0:
            yield Row(here, i, there.a * (x + (down - here.sigma) * d))
            continue
        middle = between(path, np.sqrt(here.sigma * down))
        yield Row(here, i, middle.a * (x + (middle.sigma - here.sigma) * d), base=X)
        x, d = BASE / here.a, (X / middle.a - M[0]) / middle.sigma
        yield Row(middle, i, there.a * (x + (down - here.sigma) * d + up * NOISE))


def dpmpp_2s(path: Path, eta: float) -> Iterator[Row]:
    """DPM-Solver++(2S) to sigma_down, and noise: DPM++ 2S ancestral.

    Source: Lu et al. 2022b, algorithm 1 with r = 1/2.
    """
    for i, here, there in path.moves():
        down, up = ancestral(here.sigma, there.sigma, eta)
        if down == 0:
            yield Row(here, i, there.a * M[0])
            continue
        middle = between(path, np.sqrt(here.sigma * down))
        yield Row(here, i, middle.a * _exponential_step(X / here.a, M[0], here.sigma, middle.sigma), base=X)
        x = _exponential_step(BASE / here.a, M[0], here.sigma, down)
        yield Row(middle, i, there.a * (x + up * NOISE))


def dpmpp_sde(path: Path, eta: float) -> Iterator[Row]:
    """DPM-Solver++(2S) for the reverse SDE, with noise at the middle of the step too: DPM++ SDE.

    The step's noise is the increment of one Brownian motion in sigma, made of the first half's, which BASE carries, and
    the second half's.  Source: k-diffusion's sample_dpmpp_sde, r = 1/2; Lu et al. 2022b, algorithm 1, for the drift.
    """
    for i, here, there in path.moves():
        if not there.s:
            yield Row(here, i, there.a * M[0])
            continue
        middle = between(path, np.sqrt(here.sigma * there.sigma))
        down, up = ancestral(here.sigma, middle.sigma, eta)
        x = _exponential_step(X / here.a, M[0], here.sigma, down) + up * NOISE
        down, up = ancestral(here.sigma, there.sigma, eta)
        first = np.sqrt((here.sigma - middle.sigma) / (here.sigma - there.sigma))
        second = np.sqrt(1 - first**2)
        carried = up * first * here.sigma / down * here.a if down else 0.0  # BASE is scaled by down / sigma / a below
        yield Row(here, i, middle.a * x, base=X + carried * NOISE)
        x = _exponential_step(BASE / here.a, M[0], here.sigma, down)
        yield Row(middle, i, there.a * (x + up * second * NOISE))


def _exponential_step(x, x0, sigma, sigma_next):
    """Returns x at sigma_next for an x0 that stays the same: x0 + sigma_next / sigma (x - x0)."""
    return x0 + sigma_next / sigma * (x - x0)
