"""Sampling from noise to a latent, by any of samplers.known() along any spacing of noise levels in sigmas.py.

    plan = tabulate(sd.schedule, "dpmpp_2m", steps=20, spacing="karras")           # on the host, numpy
    z, lost = sample(lambda z, t, i: sd.denoise(z, t, cond, i)[0], noise, plan, keys)    # inside jit, plan an argument

A plan is a table with one row per evaluation of the network, linear in the registers of row.py.  All samplers, step
counts and starting points share one compiled loop; only whether it draws fresh noise is static.  Latents are float32
and scaled as the network sees them: the variances of signal and noise add up to 1 at every level.

Shapes: B batch, h w latent pixels, c latent channels, K rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int, Int32, Key

from sdjax.diffusion import samplers, sigmas
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.diffusion.samplers import row, sigma_steps
from sdjax.diffusion.samplers.path import Level, Path

ROWS = 2048  # enough for 1000 steps of two evaluations; with one length, other step counts do not recompile
# (z, t, i: the step) -> prediction
Denoise = Callable[[Float[Array, "B h w c"], Float32[Array, " B"], Int[Array, ""]], Float[Array, "B h w c"]]


# (latent, base, earlier outputs, lost): the first three are registers of row.py; for `lost` see sample.
State = tuple[Array, Array, tuple[Array, ...], Array]


class Plan(struct.PyTreeNode):
    """The table of one run, padded to K rows, a multiple of ROWS; its numpy arrays are an argument of the jit.

    t: times for the network.  step: the step of a row, 0 ... steps - 1.  draw: the index of a row's fresh noise.
    output: factors of (latent, prediction) whose sum is M[0].  x, base: factors of the registers.
    rows, steps, draws: numbers of rows in use, of steps and of fresh noises.
    scale: factor of the initial noise for a run from pure noise.  a, s: signal and noise at the first level, for a run
    from a given latent.  churn: factor of the first fresh noise, added in both cases.
    stochastic: whether the run draws fresh noise.
    """

    t: Any
    step: Any
    draw: Any
    output: Any
    x: Any
    base: Any
    rows: Any
    steps: Any
    draws: Any
    scale: Any
    a: Any
    s: Any
    churn: Any
    stochastic: bool = struct.field(pytree_node=False)


def tabulate(
    schedule: Schedule,
    sampler: str = "ddim",
    steps: int = 20,
    spacing: str = "normal",
    eta: float | None = None,
    start: int = 0,
    churn: sigma_steps.Churn | None = None,
) -> Plan:
    """Returns the Plan of a run.

    spacing: spacing of the noise levels: "automatic" (A1111's choice for the sampler) or one of sigmas.SPACINGS.
    eta: amount of fresh noise, from 0 (none) to 1 (the method's most); tcd's gamma; None for the sampler's default.
    start: number of steps to skip at the noisy end, for image-to-image; diffusers counts steps - int(steps * strength).
    churn: (s_churn, s_tmin, s_tmax, s_noise) of Karras et al. 2022, for euler and heun; None or s_churn 0 for none.
    Raises ValueError for an unknown sampler or schedule, for steps, start or eta out of range, and for eta or churn if
    the sampler does not support it.
    """
    known = samplers.known()
    if sampler not in known:
        raise ValueError(f"sampler={sampler!r}: expected one of {', '.join(known)}")
    chosen = known[sampler]
    if eta and chosen.eta is None:
        raise ValueError(f"eta={eta}: {sampler} has no eta; expected 0 or None")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: expected 0 to 1")
    churn = churn if churn and churn[0] else None
    if churn and not chosen.churn:
        able = ", ".join(name for name, one in known.items() if one.churn)
        raise ValueError(f"churn={churn[0]}: {sampler} has none; expected 0, or one of {able}")
    if churn and min(churn) < 0:
        raise ValueError(f"churn={churn}: expected s_churn, s_tmin, s_tmax, s_noise, none below 0")
    grid, discard = chosen.grid, False
    if spacing == "automatic":
        spacing, discard = chosen.automatic or "normal", chosen.discard
        grid = "kdiffusion" if chosen.automatic else grid
    path = sigmas.levels(schedule, steps, spacing, grid, chosen.end, start, discard)
    more = {"churn": churn} if chosen.churn else {}
    rows = list(chosen.rows(path, (chosen.eta or 0.0) if eta is None else eta, **more))
    return fill(path, rows, chosen.output, *sigma_steps.raised(path, 0, churn))


def fill(
    path: Path,
    rows: Sequence[row.Row],
    output: str = "x0",
    above: Level | None = None,
    share: float = 0.0,
) -> Plan:
    """Returns the Plan of a path's rows (row.Row), padded.

    above, share: the level that churn raises the first step to, and its noise's factor, see sigma_steps.raised.
    """
    room = -(-len(rows) // ROWS) * ROWS
    noisy = [bool(r.x @ row.NOISE or r.base @ row.NOISE) for r in rows]
    first = path.levels[0]
    raised = above.a / first.a if above and share else 1.0

    def column(values, dtype: type = np.float32):
        values = np.asarray(values, dtype)
        return np.concatenate([values, np.zeros((room - len(rows), *values.shape[1:]), dtype)])

    return Plan(
        t=column([r.level.t for r in rows]),
        step=column([r.step for r in rows], np.int32),
        draw=column(np.cumsum(noisy) - noisy + bool(share), np.int32),
        output=column([row.outputs(path.prediction_type, r.level, output) for r in rows]),
        x=column([r.x for r in rows]),
        base=column([r.base for r in rows]),
        rows=np.int32(len(rows)),
        steps=np.int32(len(path.levels)),
        draws=np.int32(sum(noisy) + bool(share)),
        scale=np.float32(raised * path.scale),
        a=np.float32(raised * first.a),
        s=np.float32(raised * first.s),
        churn=np.float32(above.a * share if above and share else 0.0),
        stochastic=any(noisy) or bool(share),
    )


def guided_times(plan: Plan, start: float = 0.0, end: float = 1.0) -> tuple[np.float32, np.float32]:
    """Returns (first, last), float32: the range of times between the fractions `start` and `end` of the run.

    Step i of n is inside if start <= i / n < end; an evaluation within a step is inside if its time is.
    """
    fractions = np.arange(int(plan.steps)) / int(plan.steps)
    begins = plan.t[np.searchsorted(plan.step[: plan.rows], np.arange(len(fractions)))]  # falling
    behind, within = begins[fractions >= end], begins[fractions >= start]
    first = np.nextafter(behind[0], np.float32(np.inf)) if len(behind) else -np.inf
    return np.float32(first), np.float32(within[0] if len(within) else -np.inf)


def sample(
    denoise: Denoise,
    noise: Float[Array, "B h w c"],
    plan: Plan,
    keys: Key[Array, " B"] | None = None,
    *,
    z: Float[Array, "B h w c"] | None = None,
    step_noise: Float[Array | np.ndarray, "n B h w c"] | None = None,
) -> tuple[Float32[Array, "B h w c"], Int32[Array, " B"]]:
    """Returns (the final latent float32 [B h w c], lost int32 [B]).

    lost: the first step, counted from 1, after which a picture's latent was not finite; 0 for none.
    denoise(z [B h w c], t [B] float32, i int32) -> prediction [B h w c] of the schedule's type; i: the step, from 0.
    noise: standard normal [B h w c].  z: the scaled latent to start from for image-to-image; None for pure noise.
    keys: one key per image [B], for samplers that draw fresh noise: draw n of image b is normal(fold_in(keys[b], n)).
    step_noise: the fresh noise itself, [plan.draws B h w c], instead of keys.
    Raises ValueError if the sampler needs fresh noise and neither is given, or step_noise is too short.
    """
    if plan.stochastic and keys is None and step_noise is None:
        raise ValueError("keys=None: this sampler draws fresh noise; expected one key per image, or step_noise")
    if step_noise is not None and not isinstance(plan.draws, jax.core.Tracer) and len(step_noise) < plan.draws:
        raise ValueError(f"step_noise has {len(step_noise)} entries: expected {plan.draws}")
    state = begin(noise, plan, keys, z=z, step_noise=step_noise)
    z, _, _, lost = walk(denoise, state, plan, 0, plan.rows, keys, step_noise=step_noise)
    return z, lost


def begin(
    noise: Float[Array, "B h w c"],
    plan: Plan,
    keys: Key[Array, " B"] | None = None,
    *,
    z: Float[Array, "B h w c"] | None = None,
    step_noise: Float[Array | np.ndarray, "n B h w c"] | None = None,
) -> State:
    """Returns the state before a plan's first row.  Arguments: see `sample`."""
    noise = noise.astype(jnp.float32)
    x = plan.scale * noise if z is None else plan.a * z.astype(jnp.float32) + plan.s * noise
    if plan.stochastic:
        x += plan.churn * _fresh(0, x.shape[1:], keys, step_noise)
    return x, jnp.zeros_like(x), (jnp.zeros_like(x),) * len(row.M), jnp.zeros(len(x), jnp.int32)


def walk(
    denoise: Denoise,
    state: State,
    plan: Plan,
    first: int | Array,
    last: int | Array,
    keys: Key[Array, " B"] | None = None,
    *,
    step_noise: Float[Array | np.ndarray, "n B h w c"] | None = None,
) -> State:
    """Returns the state after the plan's rows first, ..., last - 1; see State."""

    def evaluate(k, state):
        x, base, past, lost = state
        t = jnp.broadcast_to(plan_t[k], x.shape[:1])
        prediction = denoise(x, t, plan_step[k]).astype(jnp.float32)
        output = to_output[k, 0] * x + to_output[k, 1] * prediction
        known = [x, base, output, *past[:-1]]
        known += [_fresh(plan_draw[k], x.shape[1:], keys, step_noise)] if plan.stochastic else []
        x, base = _combine(to_x[k], known), _combine(to_base[k], known)
        broken = (lost == 0) & ~jnp.isfinite(x).reshape(len(lost), -1).all(1)
        return x, base, (output, *past[:-1]), jnp.where(broken, plan_step[k] + 1, lost)

    plan_t, plan_step, plan_draw, to_output, to_x, to_base = (
        jnp.asarray(table) for table in (plan.t, plan.step, plan.draw, plan.output, plan.x, plan.base)
    )
    return jax.lax.fori_loop(first, last, evaluate, state)


def _fresh(n, shape, keys, step_noise):
    """Returns draw n of fresh noise [B h w c]."""
    if step_noise is not None:
        return jnp.asarray(step_noise, jnp.float32)[n]
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float32))(keys)


def _combine(factors, registers):
    """Returns the sum of factor * register, without a matrix product, which is not float32 on every device."""
    return sum(factors[j] * register for j, register in enumerate(registers))
