"""One step of training: a pure function of state and batch.

tx, evaluate = optimizer(settings.optim, settings.steps)
step = make_step(method, tx, key, loss=default_loss(method, settings, task))
state, metrics = jax.jit(step)(initial_state(trained, tx), frozen, batch)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from sdjax import trees
from sdjax.diffusion import errors
from sdjax.diffusion.loss import debiased, diffusion_loss, preservation, snr_weight
from sdjax.methods.method import Method
from sdjax.runtime import mesh
from sdjax.tasks.task import Task
from sdjax.tasks.text2img import TextToImage
from sdjax.training.optim import Evaluate, as_trained, gradients, moving_average, norm


def make_step(
    method: Method,
    tx: optax.GradientTransformation,
    root: Key[Array, ""],
    *,
    loss: Any = None,
    accumulate: int = 1,
    ema: float = 0.0,
    evaluate: Evaluate = as_trained,
) -> mesh.Step:
    """Returns the pure step(state, frozen, batch, axis=None) -> (state, metrics).

    state: {"step", "trained", "opt"[, "ema"]}.  loss(frozen, trained, batch, key, step, axis) -> (scalar, metrics); the
    method's own loss takes precedence.  The gradient is the mean over `accumulate` equal microbatches.
    metrics: the loss's own, "loss", the metrics of optim.gradients and of the method, and "update", the norm of all
    changes.  If the old weights were finite and "update" and "gradient" are, so are all new weights.
    evaluate: the optimizer's; the moving average is over its result.
    """
    loss = loss if method.loss is None else method.loss

    def step(state, frozen, batch, axis=None):
        key = jax.random.fold_in(root, state["step"])

        def gradient(microbatch):
            same = jax.random.clone(key)  # examples fold their index in, so microbatches may share the step's key
            compute = jax.value_and_grad(
                lambda trained: loss(frozen, trained, microbatch, same, state["step"], axis), has_aux=True
            )
            (value, metrics), grads = compute(state["trained"])
            return {"loss": value, **metrics}, grads

        if accumulate == 1:
            metrics, grads = gradient(batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(part)), None), zero, parts)
            metrics, grads = jax.tree.map(lambda x: x / accumulate, total)
        if axis is not None:
            metrics, grads = jax.lax.pmean((metrics, grads), axis)
        updates, opt = tx.update(grads, state["opt"], state["trained"])
        metrics = {**metrics, **gradients(grads, opt), "update": norm(updates)}
        trained = jax.tree.map(_moved, state["trained"], updates)
        trained = trained if method.project is None else method.project(trained)
        metrics |= {} if method.measure is None else method.measure(frozen, trained)
        new = {"step": state["step"] + 1, "trained": trained, "opt": opt}
        if ema:
            new["ema"] = moving_average(state["ema"], evaluate(opt, trained), ema, state["step"])
        return new, metrics

    return step


@jax.jit
def _moved(x, update):
    """Returns a weight after its update."""
    return (x + update).astype(x.dtype)


def initial_state(trained: Any, tx: optax.GradientTransformation, ema: float = 0.0) -> dict[str, Any]:
    """Returns the state before the first step, which may be donated; it contains `trained` itself, a split's copies."""
    state = {"step": jnp.int32(0), "trained": trained, "opt": _begun(tx, trained)}
    return {**state, "ema": trees.copy(trained)} if ema else state


@functools.partial(jax.jit, static_argnums=0)
def _begun(tx, trained):
    """Returns the optimizer's initial state in new buffers."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tx.init(trained))


def default_loss(method: Method, settings: Any, task: Task = TextToImage(), random: bool = True) -> Callable:
    """Returns the diffusion loss of a method's joined model on a task, with the run's weighting.

    random: whether to use the method's randomness, such as dropout.
    """
    weighting = functools.partial(snr_weight, gamma=settings.min_snr) if settings.min_snr else None
    weighting = debiased if settings.debiased else weighting
    error = functools.partial(errors.huber, c=settings.huber, decay=settings.huber_decay)
    kept = settings.preserve

    def loss(frozen, trained, batch, key, step, axis=None):
        keys = trees.example_keys(trees.named_key(key, "join"), batch["index"]) if random else None
        sd = method.join(frozen, trained, keys)
        told = task.inputs(sd, batch, trees.named_key(key, "task"))
        return diffusion_loss(
            sd, batch, key, step, error=error if settings.huber else errors.squared, weighting=weighting,
            regularisers=(preservation(kept, method.before(frozen)),) if kept else (), told=told,
            noise_offset=settings.noise_offset, pyramid=settings.pyramid, perturbation=settings.perturbation,
            skip=settings.clip_skip - 1, times=settings.times,
        )  # fmt: skip

    return loss


def of_run(settings: Any, tx: optax.GradientTransformation, evaluate: Evaluate, task: Task) -> mesh.Step:
    """Returns the step for these settings with the optimizer `tx`."""
    key = trees.named_key(trees.seed_key(settings.seed), "steps")
    loss, parts = default_loss(settings.method, settings, task), settings.optim.accumulate
    return make_step(settings.method, tx, key, loss=loss, accumulate=parts, ema=settings.ema, evaluate=evaluate)
