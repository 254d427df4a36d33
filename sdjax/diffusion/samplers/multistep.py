"""Samplers that remember: PNDM, LMS, DPM++ 2M and 3M, UniPC, DEIS.  One evaluation a step; see row.py for the form.

lam = log(a / s), h = lam' - lam.  The first steps have less to remember and are of lower order.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64

from sdjax.diffusion.samplers.row import BASE, NOISE, M, Row, X, x0_and_eps
from sdjax.diffusion.samplers.sigmas import Level, Path


def pndm(path: Path, eta: float) -> Iterator[Row]:
    """Adams-Bashforth of order 4 on the predictions, moved by DDIM's transfer: PLMS.

    The second step's level is looked at twice: the first step is done again with the mean of both its ends.
    Source: Liu et al. 2022 (PNDM), equations 9, 11 and 12, without the Runge-Kutta start, as Stable Diffusion uses it.
    """
    kind = path.prediction_type

    def move(here, there, x, raw):
        x0, eps = x0_and_eps(kind, here, x, raw)
        return there.a * x0 + there.s * eps

    # M[1] after the second look, which is no part of the history, is skipped in each
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


def lms(path: Path, eta: float, order: int = 4) -> Iterator[Row]:
    """Adams-Bashforth in sigma: the polynomial through the last slopes (M: eps), integrated.

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


def deis(path: Path, eta: float) -> Iterator[Row]:
    """The line through the last two eps in log sigma, integrated; M: eps.

    Source: Zhang and Chen 2023 (DEIS), section 3.3, with polynomials in log rho and order 2, as diffusers has it.
    """

    def integral(rho, one, other):  # of log(rho / other) / log(one / other)
        return rho * (np.log(rho / other) - 1) / np.log(one / other)

    for i, here, there in path.moves():
        if i == 0 or i == len(path.levels) - 1 and path.steps < 15:  # the last step of few is of order 1
            change = (there.sigma - here.sigma) * M[0]
        else:
            old = path.levels[i - 1].sigma
            new_weight, old_weight = (
                integral(there.sigma, *pair) - integral(here.sigma, *pair)
                for pair in ((here.sigma, old), (old, here.sigma))
            )
            change = new_weight * M[0] + old_weight * M[1]
        yield Row(here, i, there.a * (X / here.a + change))


def dpmpp_2m(path: Path, eta: float) -> Iterator[Row]:
    """DPM-Solver++(2M), and with eta its SDE: x0 extrapolated to the middle of the step by the last two.

    Source: Lu et al. 2022b, algorithm 2 (eta 0); equation of SDE-DPM-Solver++(2M), appendix (eta 1).
    """
    for i, here, there in path.moves():
        h = there.lam - here.lam
        x0 = M[0]
        if i and there.s:
            r = (here.lam - path.levels[i - 1].lam) / h
            x0 = M[0] + (M[0] - M[1]) / (2 * r)
        yield Row(here, i, _sde_step(here, there, h, eta) - there.a * np.expm1(-(1 + eta) * h) * x0)


def dpmpp_3m(path: Path, eta: float) -> Iterator[Row]:
    """The multistep solver of the same SDE with the last three x0: DPM++ 3M SDE.

    `curve` is half of the second derivative, where phi_3 wants the whole: the formula in use everywhere, of order 2
    without noise (measured).
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
        yield Row(here, i, _sde_step(here, there, h, eta) + there.a * (change - np.expm1(-(1 + eta) * h) * M[0]))


def _sde_step(here: Level, there: Level, h: float, eta: float) -> Float64[np.ndarray, " registers"]:
    """Returns s'/s exp(-eta h) x + s' sqrt(1 - exp(-2 eta h)) noise, the part of a step that no x0 enters."""
    kept = np.exp(-eta * h) if eta else 1.0
    return there.s / here.s * kept * X + there.s * np.sqrt(1 - kept**2) * NOISE


def unipc(path: Path, eta: float) -> Iterator[Row]:
    """UniPC of order 2 on x0, B(h) = exp(h) - 1 (bh2): each output first corrects the step that led to it.

    BASE is the corrected latent of the step before.  M[0]: x0 at the predicted latent.
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
