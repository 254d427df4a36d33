"""The training loop: one program for every method.

    data = Data(path="photos/cat", word="<cat>", templates="object")
    train(Train(model="pocket", method=TextualInversion(word="<cat>"), data=data), out)

Order of a run: model, split, data, optimizer, checkpoint (the newest whole one, else `init`, else fresh), steps,
export.  Run again with the same folder, it goes on from the newest checkpoint, to the same bits.
"""

import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.runtime import locks, mesh, processes
from sdjax.settings import to_json
from sdjax.stable_diffusion import StableDiffusion
from sdjax.training import checks, facts, log, preview, run
from sdjax.training.begin import begin, task_of
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.optim import check_rates, optimizer, rate
from sdjax.training.settings import Train
from sdjax.training.step import initial_state, of_run

BEFORE_STOP = 143  # exit status after SIGTERM, as shells count it: 128 + 15
CHECKED = ("loss", "gradient", "update")  # the metrics of a step that must be finite; the latter two are norms


def train(settings: Train, out: str | Path) -> StableDiffusion:
    """Runs a config to its last step in the folder `out`, going on where its checkpoints end; returns the joined model.

    Writes config.json origin.json metrics.jsonl checkpoints/ samples/ export/.
    Raises ValueError for settings that do not fit and where another process has the folder or this one is one of
    several, FloatingPointError at a loss, gradient or update that is not finite
    (nothing is written over the last good checkpoint, and no export), SystemExit(143) after SIGTERM, with a checkpoint
    written.
    """
    processes.check_alone("training")
    with locks.held(out):
        return _train(checks.worded(settings), Path(out))


def _train(settings, out):
    """Runs a config in a folder that this process has; see train."""
    method = settings.method
    checks.alone(settings)
    checks.microbatches(settings)
    examples = checks.pictures(settings)
    print(f"{mesh.described(settings.parallel)}; {settings.data.path}: {examples.about()}", flush=True)
    trained, frozen, data, base = begin(settings, examples=examples)
    check_rates(settings.optim, trained)
    tx, evaluate = optimizer(settings.optim, settings.steps)
    numbers = trees.count(trained)
    state = initial_state(trained, tx, settings.ema)
    del trained  # it is the state's
    task = task_of(settings, frozen)
    place, advance = mesh.compile(of_run(settings, tx, evaluate, task), settings.parallel, settings.data.batch)
    checkpoints, state = _resumed(out, settings, state, base, run.mark(examples))
    state, fixed = place.state(state), place.frozen(frozen)

    def learned(state):
        state = place.gather(state)
        return state["ema"] if settings.ema else evaluate(state["opt"], state["trained"])

    def show(step, state):
        seen = method.join(frozen, learned(state))
        picture = preview.write(out / "samples" / f"{step:07d}.png", method, seen, data, settings)
        if picture is not None:
            told.picture(step, "samples", picture)

    start = int(place.gather(state)["step"])
    print(f"{type(method).__name__}: {numbers:,} numbers trained, {trees.count(frozen):,} frozen; "
          f"{'resumed at step ' + str(start) if start else 'from the start'}; in {out}")  # fmt: skip
    told = log.Log(out, start, settings.steps, out.name, log.boards(out, settings.wandb, to_json(settings)))
    stop = _Stop()
    previous, schedule = None, rate(settings.optim, settings.steps)
    try:
        for n, batch in zip(range(start, settings.steps), data.iterate(start), strict=False):
            state, metrics = advance(state, fixed, place.batch(batch))
            loss = _finite(previous)  # one step late, so that the device never waits
            previous, stopped, last = (n + 1, metrics), stop.asked, n + 1 == settings.steps
            saves = stopped or _due(n + 1, settings.checkpoint, last)
            logs, shows = _due(n + 1, settings.log, last), _due(n + 1, settings.previews) and task.words
            if saves or logs or shows or last:
                _finite(previous)  # what waits for the device anyway: nothing is written of a step that went wrong
            if saves:
                checkpoints.save(place.gather(state), base, wait=stopped)
            if stopped:
                told.event(n + 1, "stopped")
                raise SystemExit(BEFORE_STOP)
            if logs:
                told.metrics(n + 1, {**metrics, "rate": schedule(n)})
            told.advance(n + 1, loss)
            if shows:
                show(n + 1, state)
    finally:
        stop.release()
        checkpoints.wait()
        checkpoints.close()
        told.close()
    return _finished(settings, frozen, learned(state), data, out, int(place.gather(state)["step"]))


def _finished(settings, frozen, weights, data, out, step):
    """Writes the export, says how it is used, and returns the joined model."""
    method = settings.method
    if method.finish is not None:
        frozen, weights = method.finish(frozen, weights, data)
    result, use = run.export(method, frozen, weights, out / "export", **facts.told(settings, out, step))
    print("\n  ".join([f"result: {result}", *(line.replace("MODEL", settings.model) for line in use)]))
    return method.join(frozen, weights).fold()


def _resumed(out, settings, state, base, pictures):
    """Returns (Checkpoints of the run's folder, the newest whole state there, else `state`); writes its settings."""
    run.check_folder(out, settings, base)
    checkpoints = Checkpoints(out / "checkpoints", settings.keep)
    found = checkpoints.restore(state, base)
    if found is None and checkpoints.damaged:  # a new start would go over what they led to
        raise ValueError(
            f"out={str(out)!r}: none of its checkpoints can be read ({', '.join(sorted(checkpoints.damaged))}); choose"
            " another out=DIR, or move them away to start anew"
        )
    run.write_settings(out, settings, base, pictures)
    return checkpoints, state if found is None else jax.tree.map(jnp.asarray, found)


def _due(step, every, last=False):
    """Returns whether something that happens every so many steps, 0 for never, happens after this one."""
    return every > 0 and (last or step % every == 0)


def _finite(pair):
    """Returns the loss of (step, metrics), None of None.

    Raises FloatingPointError where the loss, the gradient or the update is not finite.
    """
    for name in CHECKED if pair else ():
        value = float(pair[1][name])
        if not np.isfinite(value):
            said = f"the {name} of step {pair[0]} is {value if name == 'loss' else 'not finite'}"
            raise FloatingPointError(f"{said}; the last good checkpoint is untouched; a lower optim.lr may help")
    return float(pair[1]["loss"]) if pair else None


class _Stop:
    """Remembers a SIGTERM until the step is over."""

    def __init__(self):
        self.asked = False
        try:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread, as in a web server: somebody else handles signals there
            self.before = None

    def _ask(self, *_):
        self.asked = True

    def release(self):
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
