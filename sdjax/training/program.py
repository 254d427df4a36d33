"""The training program: trains by a recipe and overrides, and writes a run's folder."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdjax.runtime import accelerator, compile_cache, guard, processes, signals, watch
from sdjax.settings import SettingError, describe, load

USAGE = """usage: sdjax train RECIPE [a.b=value ...] [out=DIR]

Trains a recipe: a Python file with a function config(), such as configs/lora.py.  a.b=value overrides a setting.
Rerun the command to resume from the newest checkpoint.

    sdjax train configs/lora.py data.path=photos/cat data.word=cat
    sdjax train configs/lora.py --help      what the recipe does, and every setting"""


def main(arguments: Sequence[str], doc: str = USAGE) -> int:
    """Runs one recipe; returns the exit status.  doc: the text of --help without a recipe."""
    said = "rerun the command to resume from the newest checkpoint"
    return processes.ended(lambda: signals.ended(lambda: _run(arguments, doc, _train), said))


def fill(arguments: Sequence[str], doc: str) -> int:
    """Fills the cache of one recipe; returns the exit status."""
    said = "rerun the command to compute the rest"
    return processes.ended(lambda: signals.ended(lambda: _run(arguments, doc, _fill), said))


def _train(settings, recipe):
    """Trains with the settings of a recipe."""
    from sdjax.training import run_folder
    from sdjax.training.loop import train

    train(settings, processes.led(lambda: str(run_folder.place(settings, Path("outputs") / Path(recipe).stem))))


def _fill(settings, recipe):
    """Fills the cache of these settings."""
    if not settings.data.cache:
        raise SettingError("data.cache", "", f"the folder that the run of {recipe} will use")
    from sdjax.training.begin import begin

    _, _, data, _ = begin(settings)
    print(f"{settings.data.cache}: {data.fill(settings.epochs or 1)}")


def _run(arguments, doc, act):
    """Calls act(settings, recipe) for one recipe; returns the exit status."""
    if not arguments or list(arguments) == ["--help"]:
        print(doc)
        return 0
    path, *overrides = arguments
    watch.split()
    try:
        if "--help" in overrides:
            print(describe(path))
            return 0
        settings = load(path, overrides)
        compile_cache.keep(steps=settings.steps)
        processes.join()
        accelerator.check()
        from sdjax.training import checks

        act(checks.worded(settings), path)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:  # errors of the input; others are bugs
        said, status = f"error: {guard.line(error)}", 1
    except RuntimeError as error:
        if not processes.broken(error):
            raise
        said, status = f"error: {watch.LOST}", 1
    print(said, file=sys.stderr)
    return status
