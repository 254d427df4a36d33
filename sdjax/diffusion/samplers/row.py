"""The common form of all samplers: one row per evaluation of the network, linear in the registers.

    X      the latent of this evaluation
    BASE   a latent kept from earlier, such as the one at the start of a step of two evaluations
    M[0]   the newest output of the network, M[1] the one before, ... M[4]
    NOISE  fresh standard normal noise

A sampler is a function of a Path (noise levels) that yields rows in float64.  The registers are unit vectors there, so
a formula reads as in its paper: x = there.a * M[0] + there.s * (X - here.a * M[0]) / here.s.
Samplers differ only in numbers: one compiled loop (plan.sample) runs all of them, and another sampler or step count
does not recompile it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from sdjax.diffusion.samplers.path import Level

REGISTERS = 8
_unit = np.eye(REGISTERS)
_unit.flags.writeable = False
X, BASE, *M, NOISE = _unit


class Row(NamedTuple):
    """One evaluation of the network at a level; x is the next latent and base the next BASE, linear in the registers.

    step: the step that it belongs to, counted from the first one that runs.
    """

    level: Level
    step: int
    x: Float64[np.ndarray, " registers"]
    base: Float64[np.ndarray, " registers"] = BASE


def x0_and_eps(
    prediction_type: str, level: Level, x: Float64[np.ndarray, " N"], prediction: Float64[np.ndarray, " N"]
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """Returns (clean latent, noise) for a prediction at the latent x; both are linear in x and the prediction."""
    a, s = level.a, level.s
    if prediction_type == "epsilon":
        return (x - s * prediction) / a, prediction
    if prediction_type == "v_prediction":
        return a * x - s * prediction, a * prediction + s * x
    return prediction, (x - a * prediction) / s


def outputs(prediction_type: str, level: Level, kind: str) -> Float64[np.ndarray, " 2"]:
    """Returns the factors of the latent and of the prediction in M[0].

    kind: M[0] is "x0", the clean latent; "eps", the noise; or "raw", the prediction unchanged.
    """
    x, prediction = np.eye(2)
    x0, eps = x0_and_eps(prediction_type, level, x, prediction)
    return {"x0": x0, "eps": eps, "raw": prediction}[kind]


def eps(here: Level) -> Float64[np.ndarray, " registers"]:
    """Returns the noise in X at a level if M[0] is the clean latent: (x - a x0) / s."""
    return (X - here.a * M[0]) / here.s
