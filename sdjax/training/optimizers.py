"""The optimizers of a run, one line each; all but Muon's arrangement are optax's.

KINDS["adamw"].scale(Optim(), rate)             # the transformation from a gradient to an update
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from optax import contrib

from sdjax.training import muon

NOTHING = optax.identity()  # replaces transformations that are off, so that a run may resume with or without them


class Kind(NamedTuple):
    """An optimizer.

    moments: how many numbers it keeps for each trained number.
    scale: (settings, schedule of the rate) -> the transformation from a gradient to an update; decay and rate follow,
    unless it `finds` the rate itself: then its updates include both.
    together: whether the update of a weight depends on the other weights.
    """

    moments: float
    scale: Callable[[Any, optax.Schedule], optax.GradientTransformation]
    finds: bool = False
    together: bool = False


def _prodigy(o, rate):
    own = {"estim_lr_coef": o.growth, "weight_decay": o.weight_decay, "safeguard_warmup": True}
    return contrib.prodigy(rate, o.betas, **own)


def _dadapt(o, rate):
    return contrib.dadapt_adamw(rate, o.betas, weight_decay=o.weight_decay)


KINDS = {
    "adamw": Kind(2, lambda o, rate: optax.scale_by_adam(*o.betas)),
    "muon": Kind(2, lambda o, rate: muon.scale_by_muon(o.betas[0], optax.scale_by_adam(*o.betas)), together=True),
    "adafactor": Kind(0.01, lambda o, rate: optax.scale_by_factored_rms()),
    "sgd": Kind(0, lambda o, rate: NOTHING),
    "lion": Kind(1, lambda o, rate: optax.scale_by_lion(*o.betas)),
    "prodigy": Kind(4, _prodigy, finds=True, together=True),
    # Adam with b1 = 0: the average is around it.
    "schedule_free": Kind(2, lambda o, rate: optax.scale_by_rms(o.betas[1], eps_in_sqrt=False, bias_correction=True)),
    "adopt": Kind(2, lambda o, rate: contrib.scale_by_adopt(*o.betas)),
    # The alpha of optax.contrib.ademamix.
    "ademamix": Kind(3, lambda o, rate: contrib.scale_by_ademamix(*o.betas, alpha=5.0)),
    "dadapt_adamw": Kind(3, _dadapt, finds=True, together=True),
}
