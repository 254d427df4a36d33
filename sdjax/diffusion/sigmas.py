"""The noise levels of a run: spacings, and the grids of samplers.

    path = levels(schedule, steps=20, spacing="karras", grid="sigmas")
    for i, here, there in path.moves(): ...

Everything here runs on the host in float64.

`normal` and `karras` match the sampler's counterpart in diffusers, built with from_config from the model's
scheduler_config.json.  Counterparts differ in spacing and rounding; a grid names these differences (see GRIDS).  The
other spacings follow A1111.  `automatic` uses the grid "kdiffusion": from the model's highest sigma to its lowest, as
k-diffusion's get_sigmas; the model's config does not change it.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64

from sdjax.diffusion.noise_schedule import Schedule
from sdjax.diffusion.samplers.path import CLEAN, Level, Path

ALPHA_BAR_FLOOR = 2.0**-24  # diffusers' replacement for alpha_bar = 0 in samplers that divide by it
# grid: (default spacing of "normal", whether "karras" rounds its times)
GRIDS = {
    "times": ("leading", True),  # DDIM, DDPM, PNDM: training times, levels read from the table
    "sigmas": ("linspace", False),  # Euler, Heun, LMS: times between the training times
    "sigmas_rounded": ("linspace", True),  # DPM2
    "intervals": ("linspace", True),  # DPM-Solver++, UniPC, DEIS: steps + 1 points, the last left out
    "kdiffusion": (None, False),
    "distilled": (None, True),  # LCM, TCD: some of the 50 times at which the model was distilled
}
DISTILLED_TIMES = 50
# Source: Sabour et al. 2024, "Align Your Steps", the 10-step schedule for Stable Diffusion 1.5.
ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


# ---- spacings by sigma: each returns sigmas [steps], falling ----


def karras(high: float, low: float, steps: int, rho: float = 7.0) -> Float64[np.ndarray, " steps"]:
    """Returns sigmas by Karras et al. 2022, equation 5, with its rho = 7."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho


def exponential(high: float, low: float, steps: int) -> Float64[np.ndarray, " steps"]:
    """Returns sigmas with evenly spaced logarithms."""
    return np.exp(np.linspace(np.log(high), np.log(low), steps))


def polyexponential(high: float, low: float, steps: int, rho: float = 0.5) -> Float64[np.ndarray, " steps"]:
    """Returns sigmas whose logarithms are the rho-th power of a line, as in k-diffusion; rho = 1 is `exponential`.

    The default is between karras (about 0.7) and the spacing of the times.
    """
    return low * (high / low) ** (np.linspace(1, 0, steps) ** rho)


def align_your_steps(steps: int) -> Float64[np.ndarray, " steps"]:
    """Returns the published schedule; its logarithm is interpolated for other step counts."""
    position = np.linspace(0, 1, len(ALIGN_YOUR_STEPS))
    return np.exp(np.interp(np.linspace(0, 1, steps), position, np.log(ALIGN_YOUR_STEPS)))


def _sigma_spacings(
    table: Float64[np.ndarray, " T"], steps: int
) -> dict[str, Callable[[], Float64[np.ndarray, " steps"]]]:
    high, low = table[-1], table[0]
    return {
        "karras": lambda: karras(high, low, steps),
        "exponential": lambda: exponential(high, low, steps),
        "polyexponential": lambda: polyexponential(high, low, steps),
        "align_your_steps": lambda: align_your_steps(steps),
    }


# ---- spacings by time: each returns times [steps], falling ----


def sgm_uniform(total: int, steps: int) -> Float64[np.ndarray, " steps"]:
    """Returns evenly spaced times from T - 1 down to, but without, 0, as in Stability's generative-models."""
    return np.linspace(total - 1, 0, steps + 1)[:-1]


def simple(total: int, steps: int) -> Float64[np.ndarray, " steps"]:
    """Returns every (T / steps)-th time of the table, from its end."""
    return total - 1 - np.floor(np.arange(steps) * total / steps)


def ddim_uniform(total: int, steps: int) -> Float64[np.ndarray, " steps"]:
    """Returns the times 1, 1 + T // steps, ... of the original DDIM code, falling."""
    return leading(total, steps, 1)


def leading(total: int, steps: int, offset: int) -> Float64[np.ndarray, " steps"]:
    """Returns multiples of T // steps plus the offset, which shrinks if the last one would be outside the table."""
    ratio = total // steps
    return (np.arange(steps)[::-1] * ratio + min(offset, total - 1 - (steps - 1) * ratio)).astype(float)


def trailing(total: int, steps: int) -> Float64[np.ndarray, " steps"]:
    return np.round(total - np.arange(steps) * total / steps) - 1


TIME_SPACINGS = {"sgm_uniform": sgm_uniform, "simple": simple, "ddim_uniform": ddim_uniform}
SPACINGS = ("normal", "karras", "exponential", "polyexponential", "align_your_steps", *TIME_SPACINGS)


def normal(schedule: Schedule, steps: int, grid: str) -> Float64[np.ndarray, " steps"]:
    """Returns falling times [steps] as the grid's counterparts; all but "sigmas" and "kdiffusion" round them."""
    total = schedule.num_train_timesteps
    if grid == "kdiffusion":
        return np.linspace(total - 1, 0, steps)
    if grid == "distilled":
        return distilled(total, steps)
    spacing = schedule.timestep_spacing or GRIDS[grid][0]
    points = steps + 1 if grid == "intervals" else steps
    if spacing == "trailing":
        return trailing(total, steps)
    if spacing == "leading":
        return leading(total, points, schedule.steps_offset)[:steps]
    times = np.linspace(0, total - 1, points)[::-1][:steps]  # from 0 up, so that halves round as in diffusers
    return times if grid.startswith("sigmas") else np.round(times)


def distilled(total: int, steps: int) -> Float64[np.ndarray, " steps"]:
    """Returns some of the 50 trailing times at which consistency distillation trains Stable Diffusion.

    Source: Luo et al. 2023, "Latent Consistency Models", section 4.3 (skipping step k = 20).
    """
    count = min(DISTILLED_TIMES, total)
    times = np.arange(count, 0, -1) * (total // count) - 1
    return times[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(int)].astype(float)


# ---- paths ----


def levels(
    schedule: Schedule,
    steps: int,
    spacing: str = "normal",
    grid: str = "times",
    end: str = "clean",
    first: int = 0,
    discard: bool = False,
) -> Path:
    """Returns the Path of `steps` levels.

    end: the level after the last step.  "clean": no noise; "file": with the spacing "normal", the level by
    set_alpha_to_one of the model's scheduler config; "lowest": the level of time 0.
    first: number of steps to skip at the noisy end.
    discard: compute one more level and drop the lowest one (A1111's last but one, since its last is 0).
    Raises ValueError if steps, spacing or first are out of range, and if two levels coincide.
    """
    most = min(schedule.num_train_timesteps, DISTILLED_TIMES if grid == "distilled" else np.inf)
    if not 1 <= steps <= most:
        raise ValueError(f"steps={steps}: expected 1 to {most} for this sampler and model")
    if not 0 <= first < steps:
        raise ValueError(f"start={first}: expected 0 to steps - 1 = {steps - 1}")
    if spacing not in SPACINGS:
        raise ValueError(f"schedule={spacing!r}: expected one of {', '.join(SPACINGS)} or automatic")

    exact = grid in ("times", "distilled")
    at = functools.partial(_level_at, _exact(schedule) if exact else _floored(schedule))
    made = _spaced(schedule, steps + discard, spacing, grid)
    if discard:
        made = made[:-1]
    if not exact and any(after.sigma >= before.sigma for before, after in zip(made, made[1:], strict=False)):
        raise ValueError(f"steps={steps}: too many for schedule={spacing!r}, two levels are the same")

    ends = [*made[1:], _last(schedule, at, spacing, end)]
    if end == "file" and spacing == "normal":  # diffusers' targets, even if they differ from the next time
        back = schedule.num_train_timesteps // steps
        ends = [at(level.t - back) if level.t >= back else ends[-1] for level in made]
    full = schedule.timestep_spacing == "leading" and spacing in ("normal", "karras")
    scale = made[0].s if grid == "kdiffusion" or grid.startswith("sigmas") and not full else 1.0
    time = functools.partial(_time_of, _sigma_table(schedule))
    return Path(tuple(made), tuple(ends), steps, scale, at, time, schedule.prediction_type).start(first)


def _spaced(schedule: Schedule, steps: int, spacing: str, grid: str) -> list[Level]:
    """Returns the levels [steps] of a spacing."""
    table = _sigma_table(schedule)
    if spacing == "normal" or spacing in TIME_SPACINGS:
        total = schedule.num_train_timesteps
        times = normal(schedule, steps, grid) if spacing == "normal" else TIME_SPACINGS[spacing](total, steps)
        between = np.exp(np.interp(times, np.arange(total), np.log(table)))
        sigmas = between if grid == "kdiffusion" else np.interp(times, np.arange(total), table)
    else:
        if spacing == "karras" and grid.startswith("sigmas"):  # between the ends of "normal"
            ends = np.interp(normal(schedule, steps, grid)[[0, -1]], np.arange(len(table)), table)
            sigmas = karras(ends[0], ends[1], steps)
        else:
            sigmas = _sigma_spacings(table, steps)[spacing]()
        times = _time_of(table, sigmas)
        if spacing == "karras" and GRIDS[grid][1]:
            times = np.round(times)
    if grid in ("times", "distilled"):  # samplers of discrete time use the table's levels only
        return [_level_at(_exact(schedule), np.round(t)) for t in times]
    return [
        Level(float(t), 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma))
        for t, sigma in zip(times, sigmas, strict=True)
    ]


def _last(schedule: Schedule, at: Callable[[float], Level], spacing: str, end: str) -> Level:
    if end == "lowest" or end == "file" and spacing == "normal" and not schedule.set_alpha_to_one:
        return at(0)
    return CLEAN


def _floored(schedule: Schedule) -> Float64[np.ndarray, " T"]:
    """Returns alpha_bar [T] without an exact zero at its end."""
    alpha_bar = schedule.alphas_cumprod
    return alpha_bar if alpha_bar[-1] > 0 else np.append(alpha_bar[:-1], ALPHA_BAR_FLOOR)


def _exact(schedule: Schedule) -> Float64[np.ndarray, " T"]:
    """Returns alpha_bar [T] for samplers that can start at zero signal; floored if the model predicts noise."""
    return _floored(schedule) if schedule.prediction_type == "epsilon" else schedule.alphas_cumprod


def _sigma_table(schedule: Schedule) -> Float64[np.ndarray, " T"]:
    """Returns sigma of each training time [T], rising."""
    return np.sqrt(1 / _floored(schedule) - 1)


def _time_of(table: Float64[np.ndarray, " T"], sigmas: Any) -> Any:
    """Returns the times of sigmas: linear in log sigma between the training times."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def _level_at(alpha_bar: Float64[np.ndarray, " T"], t: float) -> Level:
    return Level(float(t), float(np.sqrt(alpha_bar[int(t)])), float(np.sqrt(1 - alpha_bar[int(t)])))
