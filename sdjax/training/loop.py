"""The training loop, the same for every method.

    data = Data(path="photos/cat", word="<cat>", templates="object")
    train(Train(model="pocket", method=TextualInversion(word="<cat>"), data=data), out)

Order of a run: model, split, data, optimizer, checkpoint (the newest complete one, otherwise `init`, otherwise random
weights), steps, export.  With the same folder it resumes from the newest checkpoint, bit for bit.
"""

import contextlib
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.runtime import locks, mesh, processes, room
from sdjax.settings import SettingError, to_json
from sdjax.stable_diffusion import StableDiffusion
from sdjax.training import checks, log, pace, run_folder, schedules
from sdjax.training.asked import LATE, SAMPLE, SAVE, STOP, Asked
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.optim import rate, rates
from sdjax.training.pace import Pace
from sdjax.training.ready import ready
from sdjax.training.session import EXPORT, Session
from sdjax.training.settings import Train

OUT_OF_MEMORY = "out of memory: a smaller data.batch, remat=True, compute=bfloat16 or fit=8GB helps"
BEFORE_STOP = 143  # exit status after SIGTERM by the shells' convention: 128 + 15
CHECKED = ("loss", "gradient", "update")  # metrics of a step that must be finite; the latter two are norms


def train(settings: Train, out: str | Path) -> StableDiffusion:
    """Trains to the last step in the folder `out`, resuming from its checkpoints; returns the joined model.

    Writes config.json origin.json metrics.jsonl checkpoints/ samples/ export/.  Several processes (processes.join) all
    call it, with a shared folder; process 0 locks the folder and writes, and all processes write checkpoints.
    Raises ValueError for settings that do not fit, if another run holds the folder, or if this process is one of
    several that have not joined.  Raises FloatingPointError for a loss, gradient or update that is not finite; the last
    checkpoint stays.
    Raises SystemExit(143) after SIGTERM, with a checkpoint written; a SIGTERM during the export waits for its end.
    """
    processes.check_joined("training")
    settings, out = checks.worded(settings), Path(out)
    safe = "the newest checkpoint is whole; make room, and the same command goes on from it"
    with contextlib.ExitStack() as holding, room.disk(out, safe), room.memory(OUT_OF_MEMORY):
        processes.led(lambda: holding.enter_context(locks.held(out)))
        processes.together(lambda: _check_shared(out, settings))
        made = _train(settings, out)
        processes.wait()
        return made


def _check_shared(out, settings):
    """Raises ValueError if several processes differ in settings or folder, or do not support a setting."""
    processes.agree("settings", json.dumps(to_json(settings), sort_keys=True))
    if not processes.several():
        return
    for name, value in (("minutes", settings.minutes), ("data.resident", settings.data.resident)):
        if value:
            raise SettingError(name, value, "none with several processes, each with a clock and a device of its own")
    if not (out / locks.FILE).exists():
        raise ValueError(f"out={str(out)!r}: is not the folder of process 0; expected one that all processes share")


def _train(settings, out):
    """Trains in a folder that process 0 has locked; see train."""
    began = time.monotonic()
    run, state = ready(settings)
    settings, place, data, base = run.settings, run.place, run.data, run.base
    many = trees.count(state["trained"])
    checkpoints, state = _resumed(out, settings, state, base, run_folder.mark(run.examples))
    state, fixed = place.state(state), place.frozen(run.frozen)
    start = int(place.gather(state["step"]))
    clock = Pace(settings.minutes, start / pace.length_of(state["opt"]), began) if settings.minutes else None
    processes.say(f"{type(settings.method).__name__}: {many:,} numbers trained, {trees.count(run.frozen):,} frozen; "
                  f"{'resumed at step ' + str(start) if start else 'from the start'}; in {out}")  # fmt: skip
    told = log.of_run(out, start, settings.steps, settings.wandb, to_json(settings))
    # Runs to its end, so that a SIGTERM leaves no incomplete checkpoint and no request for another export.
    minutes = settings.checkpoint_minutes if settings.checkpoint else 0.0
    with contextlib.closing(Asked(out, minutes)) as asked, contextlib.closing(checkpoints):
        with contextlib.closing(told):
            try:
                session = Session(settings, out, start, run.frozen, data, run.task, place, run.evaluate, checkpoints,
                                  base, told)  # fmt: skip
                if not start:
                    session.rehearse(state)
                done = session.over or (clock is not None and clock.over)
                numbers = range(start, start if done else settings.steps)
                state = _steps(
                    session, state, numbers, lambda state, rows: run.advance(state, fixed, rows), asked, clock
                )
            finally:
                checkpoints.wait()
        return session.end(state)


def _steps(session, state, numbers, advance, asked, clock):
    """Trains for these steps, or until something ends the run; returns the last state."""
    settings, previous, schedule = session.settings, None, _schedule(session.settings, state, clock)
    line = None  # of metrics that is due
    rows = session.data.of(mesh.rows(settings.parallel, settings.data.batch))
    for step, batch in zip((n + 1 for n in numbers), rows.iterate(numbers.start), strict=False):
        state, metrics = advance(state, session.place.batch(batch))
        loss, line = _finite(previous), _logged(session, line)  # one step late, so that the device never waits
        previous, files = (step, metrics), asked.now(_due(step, settings.log or 1))
        state, schedule, ending = _timed(settings, state, schedule, clock, step)
        stopped = asked.stopped(step)
        if stopped:
            _finite(previous)
            session.save(state, wait=True)  # first, since whoever stops a run may not wait for what is due
        ending = ending or step == numbers.stop or STOP in files
        if _due(step, settings.validate, ending) and settings.data.validation:
            _finite(previous)
            session.measure(step, state)  # before the others, since it may end the run
        if settings.judge and (_due(step, settings.previews, ending) or SAMPLE in files):
            _finite(previous)
            session.show(step, state)  # likewise
        last = ending or session.over
        wanted = _wanted(settings, step, last, files)
        if "log" in wanted:
            line = step, metrics, schedule(step - 1)
        if wanted - {"log"} or last or stopped:
            _finite(previous)  # actions wait for the device anyway; so they write nothing of a failed step
            line = _logged(session, line)
        if SAVE in wanted:
            asked.saved()
            if not stopped:
                session.save(state)
        session.told.advance(step, loss)
        session.after(step, state, wanted)
        _answered(session.told, step, asked, files - ({STOP, LATE} if stopped else {LATE}))
        if stopped:
            _stop(session.told, step)
        if last:
            break
    return state


def _logged(session, line):
    """Writes a line of metrics, (step, metrics, rate), if there is one."""
    if line is not None:
        step, metrics, now = line
        session.told.metrics(step, {**metrics, **rates(session.settings.optim, float(np.asarray(now)))})


def _schedule(settings, state, clock):
    """Returns the function of the learning rate, whose length a clock changes."""
    if clock is None:
        return rate(settings.optim, settings.steps)
    return functools.partial(schedules.rate, settings.optim, length=pace.length_of(state["opt"]))


def _timed(settings, state, schedule, clock, step):
    """Returns (state, schedule, whether the time is over) after a step; of the length that the clock tells."""
    length = None if clock is None else clock.after(step)
    over = clock is not None and clock.over
    length = step if over else length
    if length is None:
        return state, schedule, over
    state = {**state, "opt": pace.with_length(state["opt"], length)}
    return state, functools.partial(schedules.rate, settings.optim, length=length), over


def _stop(told, step):
    """Ends the process after SIGTERM."""
    told.event(step, "stopped")
    processes.say(f"stopped after step {step}; rerun the command to resume")
    raise SystemExit(BEFORE_STOP)


def _wanted(settings, step, last, files):
    """Returns the names of the actions that are due after a step or requested by files."""
    due = {
        SAVE: _due(step, settings.checkpoint, last) or files & {SAVE, STOP, LATE},
        SAMPLE: not settings.judge and (_due(step, settings.previews) or SAMPLE in files),
        EXPORT: _due(step, settings.export_every) or SAVE in files,
        "log": _due(step, settings.log, last),
    }
    return {name for name, is_due in due.items() if is_due}


def _answered(told, step, asked, files):
    """Logs what files requested, and removes them."""
    for name in sorted(files):
        told.event(step, name)
    asked.done(files)


def _resumed(out, settings, state, base, pictures):
    """Returns (Checkpoints, the newest complete state or `state`); writes the settings."""
    processes.led(lambda: run_folder.check_folder(out, settings, base))
    checkpoints = Checkpoints(out / "checkpoints", settings.keep)
    found = checkpoints.restore(state, base)
    if found is None and checkpoints.damaged:  # a new start would overwrite their results
        raise ValueError(
            f"out={str(out)!r}: none of its checkpoints can be read ({', '.join(sorted(checkpoints.damaged))}); choose"
            " another out=DIR, or move them away to start again"
        )
    processes.led(lambda: run_folder.write_settings(out, settings, base, pictures))
    return checkpoints, state if found is None else jax.tree.map(jnp.asarray, found)


def _due(step, every, last=False):
    """Returns whether an action with this interval is due after a step; the interval 0 means never."""
    return every > 0 and (last or step % every == 0)


def _finite(pair):
    """Returns the loss of (step, metrics), or None for None.

    Raises FloatingPointError if the loss, the gradient or the update is not finite.
    """
    for name in CHECKED if pair else ():
        value = float(pair[1][name])
        if not np.isfinite(value):
            said = f"the {name} of step {pair[0]} is {value if name == 'loss' else 'not finite'}"
            raise FloatingPointError(f"{said}; the last good checkpoint is untouched; a lower optim.lr may help")
    return float(pair[1]["loss"]) if pair else None
