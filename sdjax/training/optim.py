"""Optimizers from optax: rate schedules, clipping, per-name rates, and their metrics.

tx, evaluate = optimizer(Optim(lr=1e-4, schedule="cosine", warmup=100), steps=1000)
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import schedule_free, schedule_free_eval_params

from sdjax import trees
from sdjax.settings import ABOVE_0, FROM_0, FROM_1, TO_1, SettingError, check, check_pattern
from sdjax.training import muon, pace, schedules
from sdjax.training.leafwise import leafwise
from sdjax.training.optimizers import KINDS, NOTHING

Evaluate = Callable[[Any, Any], Any]  # (optimizer's state, trained) -> trained


@dataclass(frozen=True)
class Optim:
    """An optimizer's settings.

    kind: adamw; muon (treats kernels as matrices, other weights like adamw; learns more in few steps); adafactor
    (factored second moments, no first; about 1/100 of AdamW's state); sgd; lion (one moment; use a third of AdamW's
    rate and three times its decay); prodigy (estimates the rate: set lr=1 and schedule=cosine); schedule_free (AdamW
    that evaluates and exports an average instead of decaying the rate); adopt (AdamW that divides by the moment of
    earlier steps; its authors use betas=(0.9, 0.9999)); ademamix (AdamW with a second, slower average of gradients);
    dadapt_adamw (D-Adaptation, estimates the rate: set lr=1).
    lr: the learning rate, or A1111's list of rates and the steps until which they hold: "0.005:100, 1e-3:1000, 1e-5".
    schedule: how the rate changes after `warmup` steps, down to `end` times lr at the last step: constant, cosine,
    linear, cosine_with_restarts (`cycles` times) or polynomial (of degree `power`; 1 is linear).
    clip: largest global norm of the gradient; None is off.  accumulate: microbatches per step.
    betas: decay of the moments; Lion's authors use (0.9, 0.99).  growth: growth factor of Prodigy's rate estimate.
    rates: (pattern, factor) pairs; weights with a matching dotted name learn at factor * lr.  The first match counts.
    """

    kind: str = "adamw"
    lr: float | str = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    end: float = 0.0
    cycles: int = 1
    power: float = 1.0
    weight_decay: float = 0.01  # torch's AdamW default
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    accumulate: int = 1
    rates: tuple[tuple[str, float], ...] = ()
    growth: float = 2.0  # d_coef, the usual value among Prodigy's users

    def __post_init__(self):
        check(
            self, kind=tuple(KINDS), schedule=tuple(schedules.FALLS), warmup=FROM_0, end=TO_1, cycles=FROM_1,
            power=ABOVE_0, weight_decay=FROM_0, accumulate=FROM_1, growth=ABOVE_0,
        )  # fmt: skip
        self._check_rate()
        if self.clip is not None:
            check(self, clip=ABOVE_0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SettingError("betas", self.betas, "two numbers from 0 to below 1")
        if self.kind == "schedule_free" and (self.schedule != "constant" or not self.betas[0]):
            name, wanted = ("schedule", "'constant'") if self.betas[0] else ("betas", "a first number above 0")
            raise SettingError(name, getattr(self, name), f"{wanted} with kind=schedule_free")
        for pattern, factor in self.rates:
            if not 0 <= factor < math.inf:
                raise SettingError("rates", self.rates, "factors from 0, as in (('to_k', 0.5),)")
            check_pattern("rates", pattern)

    def _check_rate(self):
        """Raises SettingError for a rate, or a list of rates, that does not fit."""
        if isinstance(self.lr, str):
            try:
                schedules.listed(self.lr)
            except ValueError:
                raise SettingError(
                    "lr", self.lr, "a number from 0, or rates until rising steps: '5e-3:100, 1e-3'"
                ) from None
            for name, usual in {"schedule": "constant", "warmup": 0}.items():
                if getattr(self, name) != usual:
                    raise SettingError(name, getattr(self, name), f"{usual!r} with a list of rates as lr")
            if KINDS[self.kind].finds or self.kind == "schedule_free":
                raise SettingError("lr", self.lr, f"one number with kind={self.kind}, which plans the rate")
            return
        check(self, lr=FROM_0)
        if KINDS[self.kind].finds and 0 < self.lr < 0.01:
            said = f"about 1 with kind={self.kind}"
            raise SettingError("lr", self.lr, said, "it is a factor of the rate that the optimizer finds")


def rate(optim: Optim, steps: int) -> optax.Schedule:
    """Returns the schedule step -> learning rate for a run of `steps` steps."""
    lr, warmup, length = optim.lr, optim.warmup, max(steps - optim.warmup, 1)
    own = functools.partial(schedules.rate, optim, length=steps)
    if isinstance(lr, str):
        return own
    bodies = {
        "constant": optax.constant_schedule(lr),
        "cosine": optax.cosine_decay_schedule(lr, length, alpha=optim.end),
        "linear": optax.linear_schedule(lr, optim.end * lr, length),
    }
    if optim.schedule not in bodies:
        return own
    body = bodies[optim.schedule]
    if not warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), body], [warmup])


def optimizer(optim: Optim, steps: int, minutes: float = 0.0) -> tuple[optax.GradientTransformation, Evaluate]:
    """Returns (tx, evaluate) of these settings for a run of `steps` steps.

    minutes: length of a run by the clock, see pace.py; 0 for `steps`.
    tx: the optax transformation.  evaluate(opt, trained): returns the weights to preview, average and export, given
    tx's state.  These are schedule-free's averages (Defazio et al. 2024, x of equation 3), or else the trained weights.
    """
    schedule = rate(optim, steps)
    clip = clipped(optim.clip) if optim.clip else NOTHING
    kind = KINDS[optim.kind]
    parts = [clip, *(tx if kind.together or tx is NOTHING else leafwise(tx) for tx in _scaled(optim, schedule))]
    shaped = {"adafactor": lambda tx: tx, "muon": muon.packed}.get(optim.kind, _as_vector)
    named = _by_name(optim) if optim.rates else NOTHING
    rated = pace.by_length(optim, steps) if minutes else leafwise(optax.scale_by_learning_rate(schedule))
    tx = optax.chain(shaped(optax.chain(*parts)), named, NOTHING if kind.finds else rated)
    if optim.kind == "schedule_free":
        return schedule_free(tx, schedule, optim.betas[0]), schedule_free_eval_params
    return tx, as_trained


def clipped(most: float) -> optax.GradientTransformation:
    """Returns optax.clip_by_global_norm(most), leaf by leaf."""

    @jax.jit
    def clip(x, total):
        return jax.lax.select(total < most, x, (x / total.astype(x.dtype)) * most)

    def update(updates, state, params=None):
        total = _length(jax.tree.leaves(updates))
        return jax.tree.map(lambda x: clip(x, total), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@jax.jit
def _squares(x):
    """Returns the sum of squares, float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def _length(leaves):
    """Returns the norm of all leaves together, float32."""
    return jnp.sqrt(_sum([_squares(x) for x in leaves]))


@jax.jit
def _sum(numbers):
    return sum(numbers)


def _scaled(optim, schedule):
    """Returns the transformations from a gradient to an update, before the rate."""
    scale = KINDS[optim.kind].scale(optim, schedule)
    if KINDS[optim.kind].finds:
        return [scale]
    return [
        scale,
        optax.clip_by_block_rms(1.0) if optim.kind == "adafactor" else NOTHING,  # Shazeer and Stern 2018, 6: d = 1
        optax.add_decayed_weights(optim.weight_decay) if optim.weight_decay else NOTHING,
    ]


def as_trained(opt: Any, trained: Any) -> Any:
    """Returns the trained weights: `evaluate` for an optimizer without averages."""
    return trained


def check_rates(optim: Optim, trained: dict) -> None:
    """Raises ValueError if a pattern of `rates` matches no trained weight's name."""
    names = trees.names(trained)
    for pattern, _ in optim.rates:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"optim.rates: {pattern!r} matches nothing that is trained; expected a pattern of names such as"
                f" {trees.listing(names, 4)}"
            )


def norm(tree: Any) -> Float[Array, ""]:
    """Returns the global norm of a tree of gradients or updates, in float32; a small tree is one vector."""
    leaves = jax.tree.leaves(tree)
    if trees.count(tree) <= muon.SMALL:
        leaves = [jnp.concatenate([x.ravel() for x in leaves])]
    return _length(leaves)


def gradients(grads: Any, opt: Any) -> dict[str, Array]:
    """Returns the norms of a step's gradients for its metrics: of all and, for several groups, of each.

    A group is a part of the trained tree, such as "unet".  With an optimizer that finds the rate also "found", its
    estimate d of it.
    """
    groups = grads if isinstance(grads, dict) and len(grads) > 1 else {}
    apart = {f"gradient.{name}": norm(tree) for name, tree in groups.items() if isinstance(tree, dict) and tree}
    found = optax.tree.get(opt, "estim_lr")
    return {"gradient": norm(grads), **apart, **({} if found is None else {"found": found})}


def rates(optim: Optim, now: float) -> dict[str, float]:
    """Returns the rates of a step for its metrics: "rate", and "rate.PATTERN" for each of optim.rates."""
    return {"rate": now, **{f"rate.{pattern}": factor * now for pattern, factor in optim.rates}}


def _as_vector(inner):
    """Returns a transformation that sees a small model's weights as one vector; hundreds of arrays compile slowly."""
    flat = optax.flatten(inner)

    def of(tree):
        return flat if 0 < trees.count(tree) <= muon.SMALL else inner

    return optax.GradientTransformation(
        lambda params: of(params).init(params),
        lambda updates, state, params=None: of(updates).update(updates, state, params),
    )


def factor_of(optim: Optim, name: str) -> float:
    """Returns the factor of a weight's rate: of the first pattern of `rates` that its dotted name matches, or 1."""
    return next((value for pattern, value in optim.rates if re.search(pattern, name)), 1.0)


def _by_name(optim):
    """Returns a transformation that multiplies each update by factor_of its name."""

    def update(updates, state, params=None):
        return trees.map_names(lambda name, x: factor_of(optim, name) * x, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def moving_average(ema: Any, trained: Any, decay: float, step: Int[Array, ""] | int) -> Any:
    """Returns ema + (1 - decay') (trained - ema), decay' = min(decay, (1 + step) / (10 + step)).

    The ramp makes the average forget the start.  The average of equal numbers is exactly that number.
    Source: TensorFlow's ExponentialMovingAverage with num_updates.
    """
    now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, x: _mixed(now, e, x), ema, trained)


@jax.jit
def _mixed(decay, one, other):
    return one + (1 - decay) * (other - one)
