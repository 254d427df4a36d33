"""PNDM, which A1111 calls PLMS: Adams-Bashforth on the predictions."""

from collections.abc import Iterator

from sdjax.diffusion.samplers.path import Path
from sdjax.diffusion.samplers.row import BASE, M, Row, X, x0_and_eps
from sdjax.diffusion.samplers.sampler import Sampler


def pndm(path: Path, eta: float) -> Iterator[Row]:
    """Extrapolates the predictions by Adams-Bashforth of order 4 and steps by DDIM's transfer: PLMS.

    The first step is repeated with the mean of the predictions at both of its ends.
    Source: Liu et al. 2022 (PNDM), equations 9, 11 and 12, without the Runge-Kutta start, as Stable Diffusion uses it.
    """
    kind = path.prediction_type

    def move(here, there, x, raw):
        x0, eps = x0_and_eps(kind, here, x, raw)
        return there.a * x0 + there.s * eps

    # Later steps skip the output of the repeated step's second evaluation, which is not part of the history.
    recent = (
        (3 * M[0] - M[2]) / 2,
        (23 * M[0] - 16 * M[1] + 5 * M[3]) / 12,
        (55 * M[0] - 59 * M[1] + 37 * M[2] - 9 * M[4]) / 24,
    )
    full = (55 * M[0] - 59 * M[1] + 37 * M[2] - 9 * M[3]) / 24
    for i, here, there in path.moves():
        if i:
            yield Row(here, i, move(here, there, X, recent[i - 1] if i <= len(recent) else full))
            continue
        yield Row(here, i, move(here, there, X, M[0]), base=X)
        if len(path.levels) > 1:
            yield Row(path.levels[1], i, move(here, there, BASE, (M[0] + M[1]) / 2))


PNDM = Sampler("pndm", "PLMS", pndm, "times", output="raw", end="file")
