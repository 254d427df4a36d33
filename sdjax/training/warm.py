"""Fills the cache of compiled programs for a run: its step, its encoders, its validation and its previews.

    warm(settings)          # the same run then compiles nothing that takes long

It trains nothing and writes nothing but data.cache.  Other numbers of steps, rates or seeds are other programs.
"""

from pathlib import Path

from sdjax.data import batches
from sdjax.runtime import mesh
from sdjax.training import checks, preview
from sdjax.training.begin import shown
from sdjax.training.ready import ready
from sdjax.training.settings import Train
from sdjax.training.validation import Validation


def warm(settings: Train) -> None:
    """Compiles what a run with these settings compiles.

    Reads pictures and model as the run does, so that frozen encoders run on the first batches.
    Raises the errors of `ready`.
    """
    run, state = ready(checks.worded(settings))
    settings, place = run.settings, run.place
    state, fixed = place.state(state), place.frozen(run.frozen)
    rows = run.data.of(mesh.rows(settings.parallel, settings.data.batch))
    for step in preview.first_steps(run.data):
        run.advance.lower(state, fixed, place.batch(rows[step])).compile()
    learned = place.whole(state["trained"])
    held_out = batches.held_out(shown(settings, run.task), run.frozen, settings.seed)
    if held_out is not None:
        measured = Validation(settings, run.task, run.frozen, held_out, Path()).measured
        measured.lower(run.frozen, learned, held_out[0]).compile()
    if settings.previews:
        seen = settings.method.join(run.frozen, learned).fold()
        preview.sheet(settings.method, seen, run.data, settings, steps=1)  # of any steps it is one program
