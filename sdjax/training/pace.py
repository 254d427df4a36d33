"""A run's length by the clock: `minutes` of time instead of a number of steps.

The schedule's length is part of the optimizer's state.  The loop sets it from the measured time of a step, so the step
compiles only once.

    tx = by_length(optim, steps)                    # instead of optax.scale_by_learning_rate
    pace = Pace(minutes=9, share=0.0, began=time.monotonic())
    length = pace.after(step)                       # a new length from time to time, else None
    opt = with_length(opt, length)
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sdjax.training import schedules

LEAST = 1.0  # least seconds between two measurements
EARLY = 10.0  # most seconds until the first one
FEW = 4  # least number of steps, even after the time is over
SHARE = 0.25  # share of the remaining time until the next measurement


class Paced(NamedTuple):
    """The state: steps taken, and the run's length in steps."""

    taken: Int[Array, ""]
    length: Float[Array, ""]


def by_length(optim: Any, steps: int) -> optax.GradientTransformation:
    """Returns the transformation that multiplies updates by -schedules.rate(optim, count, length).

    steps: the initial length.
    """

    def init(params):
        return Paced(jnp.int32(0), jnp.float32(steps))

    def update(updates, state, params=None):
        now = -schedules.rate(optim, state.taken, state.length)
        return jax.tree.map(lambda x: (now * x).astype(x.dtype), updates), state._replace(taken=state.taken + 1)

    return optax.GradientTransformation(init, update)


def length_of(opt: Any) -> float:
    """Returns the length in an optimizer's state."""
    return float(jnp.ravel(optax.tree.get(opt, "length"))[0])


def with_length(opt: Any, length: float) -> Any:
    """Returns an optimizer's state with another length."""
    return optax.tree.set(opt, length=jnp.full_like(optax.tree.get(opt, "length"), length))


class Pace:
    """The clock of a run.  share: the part of it that earlier processes did.  began: the clock's time at the start."""

    def __init__(self, minutes: float, share: float, began: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.deadline = clock, began + 60 * minutes * (1 - min(share, 1))
        self.then, self.next, self.taken, self.done = None, began, 0, share >= 1

    @property
    def over(self) -> bool:
        """Whether the time has passed, after FEW steps at least."""
        return self.done or (self.taken >= FEW and self.clock() >= self.deadline)

    def after(self, step: int) -> float | None:
        """Returns the run's length by the time of the last steps, after step number `step`; None between measurements.

        The first step only starts the clock, since it compiles.
        """
        now, self.taken = self.clock(), self.taken + 1
        if now < self.next and self.then is not None:
            return None
        left, before, self.then = self.deadline - now, self.then, (step, now)
        soon = SHARE * left if before else min(EARLY, SHARE * left)
        self.next = now + max(LEAST, soon)
        if before is None:
            return None
        return step + max(0.0, left) * (step - before[0]) / max(now - before[1], 1e-9)
