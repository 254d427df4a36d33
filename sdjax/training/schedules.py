"""How the learning rate changes over a run: one line per schedule, and A1111's list of rates.

    FALLS["cosine"](0.5, optim)                     # 0.5: half of the way from lr to end * lr, in the middle of the run
    listed("0.005:100, 1e-3:1000, 1e-5")            # Listed((0.005, 0.001, 1e-05), (100, 1000)): the rates, their ends

Sources: diffusers' and transformers' get_scheduler for the names and curves; AUTOMATIC1111's stable-diffusion-webui
for the list.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


def _cosine(x, optim):
    return 0.5 - 0.5 * jnp.cos(jnp.pi * x)


def _restarts(x, optim):
    """Returns the cosine of each of optim.cycles equal parts; the end of the last one is not a start."""
    return jnp.where(x < 1, _cosine(optim.cycles * x % 1, optim), 1.0)


# (share of the run after the warmup, settings) -> share of the way from lr to end * lr
FALLS = {
    "constant": lambda x, optim: jnp.zeros_like(x),
    "cosine": _cosine,
    "linear": lambda x, optim: x,
    "cosine_with_restarts": _restarts,
    "polynomial": lambda x, optim: 1 - (1 - x) ** optim.power,
}


def rate(optim: Any, count: Any, length: Any) -> Float[Array, ""]:
    """Returns the learning rate of step `count`, from 0, in a run of `length` steps; both may be arrays."""
    if isinstance(optim.lr, str):
        rates, ends = listed(optim.lr)
        return jnp.asarray(rates)[jnp.searchsorted(jnp.asarray(ends, jnp.int32), count, side="right")]
    share = jnp.clip((count - optim.warmup) / jnp.maximum(length - optim.warmup, 1), 0, 1)
    body = optim.lr * (1 - (1 - optim.end) * FALLS[optim.schedule](share, optim))
    return jnp.where(count < optim.warmup, optim.lr * count / max(optim.warmup, 1), body)


class Listed(NamedTuple):
    """A list of rates; ends: how many steps of the run are over when a rate ends, for all but the last."""

    rates: tuple[float, ...]
    ends: tuple[int, ...]


def listed(text: str) -> Listed:
    """Returns the rates of A1111's list "rate:step, ...": each rate until its step.

    The last rate stays until the end of the run, whatever its step; A1111 would end the run at that step.
    Raises ValueError for a text that is not such a list, and for steps that do not rise.
    """
    pairs = [pair.partition(":")[::2] for pair in text.split(",") if pair.strip()]
    try:
        rates = tuple(float(rate) for rate, _ in pairs)
        ends = tuple(int(end) for _, end in pairs[:-1])
        last = int(pairs[-1][1] or -1)  # checked only
    except (ValueError, IndexError):
        raise ValueError("not a list") from None
    rising = (0, *ends, *((last,) if last != -1 else ()))
    if any(a >= b for a, b in zip(rising, rising[1:], strict=False)) or not all(0 <= x < math.inf for x in rates):
        raise ValueError("not rising")
    return Listed(rates, ends)
