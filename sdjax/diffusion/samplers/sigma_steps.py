"""Functions for samplers in k-diffusion's variables.

x / a is the latent of variance 1 + sigma², with the ODE dx/dsigma = (x - x0) / sigma; lam = log(a / s), h = lam' - lam.
A step of two evaluations yields two rows; in the second one, BASE is the latent at the start of the step, M[1] its
output.
"""

import numpy as np
from jaxtyping import Float64

from sdjax.diffusion.samplers.path import Level, Path
from sdjax.diffusion.samplers.row import NOISE, X

MOST_CHURN = np.sqrt(2) - 1  # most churn of one step: Karras et al. 2022, algorithm 2
Churn = tuple[float, float, float, float]  # s_churn, s_tmin, s_tmax, s_noise of the source
Registers = Float64[np.ndarray, " registers"]


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Returns (sigma_down, sigma_up): the end of the deterministic part, and the noise that raises it to sigma_next.

    Source: Song et al. 2021 (DDIM), equation 16, in sigmas, as in k-diffusion.
    """
    up = min(sigma_next, eta * sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2))
    return np.sqrt(sigma_next**2 - up**2), up


def between(path: Path, sigma: float) -> Level:
    """Returns the level of any sigma, at its fractional time in the model's table."""
    return Level(float(path.time(sigma)), 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma))


def raised(path: Path, i: int, churn: Churn | None) -> tuple[Level, float]:
    """Returns (the noisier level that step i starts from, the factor of NOISE that leads there), both in sigma.

    churn: (s_churn, s_tmin, s_tmax, s_noise) of the source; None, and i after the last step, return the level itself
    and 0.
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


def exponential(x: Registers, x0: Registers, sigma: float, sigma_next: float) -> Registers:
    """Returns x at sigma_next for a constant x0: x0 + sigma_next / sigma (x - x0)."""
    return x0 + sigma_next / sigma * (x - x0)


def reverse_sde(here: Level, there: Level, h: float, eta: float) -> Registers:
    """Returns s'/s exp(-eta h) x + s' sqrt(1 - exp(-2 eta h)) noise: the part of a step without x0."""
    kept = np.exp(-eta * h) if eta else 1.0
    return there.s / here.s * kept * X + there.s * np.sqrt(1 - kept**2) * NOISE
