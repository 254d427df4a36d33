"""A run before its first step: what it needs, and its compiled step.

run, state = ready(settings)
state, metrics = run.advance(run.place.state(state), run.place.frozen(run.frozen), run.place.batch(run.data[0]))
"""

from dataclasses import dataclass, replace
from typing import Any

from sdjax import trees
from sdjax.data import lengths
from sdjax.data.batches import Batches
from sdjax.data.sources.source import Examples
from sdjax.runtime import mesh, processes
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task
from sdjax.training import checks, fit
from sdjax.training.begin import begin, task_of
from sdjax.training.optim import Evaluate, check_rates, optimizer
from sdjax.training.settings import Train
from sdjax.training.step import initial_state, of_run


@dataclass(frozen=True)
class Run:
    """A run without its state, which training replaces.

    settings: with the choices of `fit` and epochs as steps.  base: the digest of `begin`.  place, advance: see
    mesh.compile.  evaluate: the optimizer's.
    """

    settings: Train
    examples: Examples
    frozen: StableDiffusion
    data: Batches
    base: str
    task: Task
    evaluate: Evaluate
    place: mesh.Place
    advance: mesh.Run


def ready(settings: Train) -> tuple[Run, dict[str, Any]]:
    """Returns (a run, its first state), not yet placed on the devices; prints devices, pictures and choices.

    Raises the errors of `begin` and mesh.compile.
    """
    checks.alone(settings)
    settings = fit.typed(settings)
    checks.microbatches(settings)
    examples = processes.together(lambda: checks.pictures(settings))
    processes.say(f"{mesh.described(settings.parallel)}; {settings.data.path}: {examples.about()}")
    trained, frozen, data, base = processes.together(lambda: begin(settings, examples=examples))
    if processes.several():  # different copies of an array would never be noticed
        processes.agree("model, init or pictures", f"{base} {trees.digest(trained)}")
    if settings.epochs:
        settings = replace(settings, steps=data.plan.batches(settings.epochs))
    if settings.fit:
        settings, chosen = fit.fitted(settings, trained, frozen, data.size, "pixels" in data[0])
        frozen = frozen.with_dtype(settings.compute, remat=settings.remat)
        processes.say(chosen)
    if settings.data.buckets and not data.squares:
        many = len(data.plan.shapes)
        processes.say(f"buckets: {data.plan.about()}{'; each compiles a program' * (many > 1)}")
    if settings.method.loss is None and (cut := lengths.cut(data.captions(), frozen.tokenizers, settings.data.chunks)):
        processes.say(cut)
    check_rates(settings.optim, trained)
    tx, evaluate = optimizer(settings.optim, settings.steps, settings.minutes)
    task, state = task_of(settings, frozen), initial_state(trained, tx, settings.ema)
    step = of_run(settings, tx, evaluate, task)
    if settings.fit and settings.parallel == "single":
        frozen = fit.aside(step, state, frozen, data[0])
    place, advance = mesh.compile(step, settings.parallel, settings.data.batch, settings.sharding)
    return Run(settings, examples, frozen, data, base, task, evaluate, place, advance), state
