"""Optimizers from optax: rate schedules, clipping, per-name rates, Muon, and factored states for large models.

Optim(lr=1e-4, schedule="cosine", warmup=100)
"""

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from sdjax import config, trees

SMALL = 1 << 24  # numbers
KINDS = ("adamw", "muon", "adafactor", "sgd")
SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class Optim:
    """An optimizer's settings.

    kind: adamw; muon (kernels as matrices, all else as adamw does: more from each of few steps); adafactor (second
    moments factored, no first: about 1/100 of AdamW's state); sgd.
    schedule: of the rate after `warmup` steps, falling to `end` times lr at the run's last step.
    clip: largest global norm of a gradient; None for no clipping.  accumulate: microbatches per step.
    rates: (pattern, factor) pairs; a trained weight whose dotted name matches learns at factor * lr (first match).
    """

    kind: str = "adamw"
    lr: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    end: float = 0.0
    weight_decay: float = 0.01  # torch's AdamW default
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    accumulate: int = 1
    rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        config.check(
            self, "optim.", kind=KINDS, schedule=SCHEDULES, lr=config.FROM_0, warmup=config.FROM_0, end=config.TO_1,
            weight_decay=config.FROM_0, accumulate=config.FROM_1,
        )  # fmt: skip
        if self.clip is not None:
            config.check(self, "optim.", clip=config.ABOVE_0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas}: expected two numbers from 0 to below 1")
        for pattern, factor in self.rates:
            if not 0 <= factor < math.inf:
                raise ValueError(f"optim.rates={self.rates}: expected factors from 0, as in (('to_k', 0.5),)")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"optim.rates={self.rates}: {pattern!r} is no regular expression: {error}") from None


def rate(optim, steps):
    """Returns the schedule step -> learning rate for a run of `steps` steps."""
    body = {
        "constant": lambda n: optax.constant_schedule(optim.lr),
        "cosine": lambda n: optax.cosine_decay_schedule(optim.lr, n, alpha=optim.end),
        "linear": lambda n: optax.linear_schedule(optim.lr, optim.end * optim.lr, n),
    }[optim.schedule](max(steps - optim.warmup, 1))
    if not optim.warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, optim.lr, optim.warmup), body], [optim.warmup])


def transform(optim, steps):
    """Returns the optax transformation of these settings for a run of `steps` steps."""
    b1, b2 = optim.betas
    scale = {
        "adamw": lambda: optax.scale_by_adam(b1, b2),
        "muon": lambda: _muon(b1, optax.scale_by_adam(b1, b2)),
        "adafactor": lambda: optax.scale_by_factored_rms(),
        "sgd": lambda: optax.identity(),
    }[optim.kind]()
    parts = [optax.clip_by_global_norm(optim.clip)] if optim.clip else []
    parts += [scale]
    if optim.kind == "adafactor":
        parts += [optax.clip_by_block_rms(1.0)]  # Shazeer and Stern 2018, section 6: d = 1
    if optim.weight_decay:
        parts += [optax.add_decayed_weights(optim.weight_decay)]
    by_shape = optim.kind in ("adafactor", "muon")
    whole = optax.chain(*parts) if by_shape else _as_vector(optax.chain(*parts))
    named = [_by_name(optim.rates)] if optim.rates else []
    return optax.chain(whole, *named, optax.scale_by_learning_rate(rate(optim, steps)))


def _muon(beta, rest):
    """Returns a transformation that makes gradients of kernels orthogonal and hands all others to `rest`.

    A kernel [a b in, out] is one matrix, a kernel [count in out] is `count` of them.  With U S V^T the singular value
    decomposition of its momentum the update is close to 0.2 sqrt(max(rows, columns)) U V^T: root mean square 0.2, as
    large as AdamW's usually are, so that both take the same rates.
    Source: Jordan et al. 2024, "Muon"; the factor: Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2.
    """
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    orthogonal = scale_by_muon(beta=beta, weight_dimension_numbers=lambda tree: jax.tree.map(lambda x: numbers, tree))
    sized = optax.stateless(lambda tree, _: jax.tree.map(lambda x: 0.2 * max(x.shape[1:]) ** 0.5 * x, tree))

    def kind(name, x):
        return "kernel" if name.endswith("kernel") and min(_matrix(x)) > 1 else "other"

    return optax.partition(
        {"kernel": _as_stacks(optax.chain(orthogonal, sized)), "other": _as_vector(rest)},
        lambda tree: trees.map_names(kind, tree),
    )


def _matrix(kernel):
    """Returns (rows, columns) of the matrix or matrices in a kernel [a b in out], [count in out] or [in out]."""
    return math.prod(kernel.shape[:3]) if kernel.ndim == 4 else kernel.shape[-2], kernel.shape[-1]


def _as_stacks(inner):
    """Returns a transformation that sees a small model's kernels as one stack of matrices for each size.

    Hundreds of them compile far slower.  A large model's come one by one, since stacks are copies.
    """

    def groups(tree):
        small, found = trees.count(tree) <= SMALL, {}
        for number, x in enumerate(jax.tree.leaves(tree)):
            found.setdefault(_matrix(x) if small else number, []).append(number)
        return found.values()

    def stacked(tree):
        matrices = [x.reshape(-1, *_matrix(x)) for x in jax.tree.leaves(tree)]
        return [jnp.concatenate([matrices[number] for number in group]) for group in groups(tree)]

    def update(updates, state, params=None):
        changed, state = inner.update(stacked(updates), state)
        leaves, treedef = jax.tree.flatten(updates)
        for stack, group in zip(changed, groups(updates), strict=True):
            ends = np.cumsum([leaves[number].size // math.prod(stack.shape[1:]) for number in group])
            for number, part in zip(group, jnp.split(stack, ends[:-1]), strict=True):
                leaves[number] = part.reshape(leaves[number].shape)
        return treedef.unflatten(leaves), state

    return optax.GradientTransformation(lambda params: inner.init(stacked(params)), update)


def norm(tree):
    """Returns the global norm of a tree of gradients or updates, in float32; as one vector where the tree is small."""
    leaves = jax.tree.leaves(tree)
    if trees.count(tree) <= SMALL:
        leaves = [jnp.concatenate([x.ravel() for x in leaves])]
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves))


def _as_vector(inner):
    """Returns a transformation that sees a small model's weights as one vector: hundreds compile far slower."""
    flat = optax.flatten(inner)

    def of(tree):
        return flat if 0 < trees.count(tree) <= SMALL else inner

    return optax.GradientTransformation(
        lambda params: of(params).init(params), lambda updates, *rest: of(updates).update(updates, *rest)
    )


def _by_name(rates):
    """Returns a transformation that multiplies each update by the factor of the first pattern that its name matches."""

    def factor(name):
        return next((value for pattern, value in rates if re.search(pattern, name)), 1.0)

    def update(updates, state, params=None):
        return trees.map_names(lambda name, x: factor(name) * x, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def moving_average(ema, trained, decay, step):
    """Returns decay' * ema + (1 - decay') * trained, decay' = min(decay, (1 + step) / (10 + step)).

    The ramp lets the average forget the start.  Source: TensorFlow's ExponentialMovingAverage with num_updates.
    """
    now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, x: now * e + (1 - now) * x, ema, trained)
