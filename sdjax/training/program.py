"""The training program: trains by a recipe and overrides, and writes a run's folder."""

import functools
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdjax.runtime import accelerator, compile_cache, guard, processes, signals, watch
from sdjax.settings import SettingError, describe, load
from sdjax.training import recipes

TRAIN = """usage: {prog} RECIPE [a.b=value ...] [out=DIR]

Trains any method.  RECIPE is a Python file with a function config(), or one of
{recipes}.
a.b=value overrides any setting.  The run writes config.json, origin.json, metrics.jsonl, checkpoints/, samples/ and
export/ to DIR.  The default DIR is the recipe's own, otherwise outputs/NAME of the recipe; {{picture}} in it stands for
the picture's name.  Rerun the command to resume from the newest checkpoint.

    {prog} lora data.path=photos/cat data.word=cat optim.lr=1e-4
    {prog} lora --help      what the recipe does, and every setting"""
CACHE = """usage: {prog} RECIPE [a.b=value ...] data.cache=DIR

Fills a run's cache before it trains: moments or pictures, and the text encoder's outputs.  RECIPE is a Python file
with a function config(), or one of
{recipes}.
Use the recipe and settings of the run.  Rerun the command after any interruption: it computes what is missing or
damaged.  For randomly drawn prompts (templates, shuffled captions) it covers `epochs` epochs, at least one; the run
adds the others as it meets them.

    {prog} lora data.path=photos/cat data.cache=cache
    {prog} lora --help      what the recipe does, and every setting"""

WARM = """usage: {prog} RECIPE [a.b=value ...]

Compiles what a training run compiles, so that its first step does not wait.  It trains nothing.  RECIPE is a Python
file with a function config(), or one of
{recipes}.
Use the recipe and settings of the run; E4T's photo may be another one.

    {prog} lora data.path=photos/cat data.word=cat
    {prog} pocket/tune data.path=photo.png"""


def main(
    arguments: Sequence[str],
    prog: str = "sdjax train",
    prepare: Callable[[Any, Path], Any] = lambda settings, out: settings,
) -> int:
    """Runs one recipe; returns the exit status.  prog: the program's name in its help.

    prepare: returns the settings to train with, for the recipe's and the run's folder.
    """
    said = "rerun the command to resume from the newest checkpoint"
    act = functools.partial(_train, prepare=prepare)
    return processes.ended(lambda: signals.ended(lambda: _run(arguments, TRAIN, prog, act), said))


def fill(arguments: Sequence[str], prog: str = "sdjax cache") -> int:
    """Fills the cache of one recipe; returns the exit status.  prog: the program's name in its help."""
    said = "rerun the command to compute the rest"
    return processes.ended(lambda: signals.ended(lambda: _run(arguments, CACHE, prog, _fill), said))


def warm(arguments: Sequence[str], prog: str = "sdjax warm") -> int:
    """Compiles the programs of one recipe; returns the exit status.  prog: the program's name in its help."""
    said = "rerun the command to compile the rest"
    return processes.ended(lambda: signals.ended(lambda: _run(arguments, WARM, prog, _warm), said))


def _train(settings, recipe, prepare):
    """Trains with the settings of a recipe."""
    from sdjax.training import run_folder
    from sdjax.training.loop import train

    out = Path(processes.led(lambda: str(run_folder.place(settings, Path("outputs") / Path(recipe).stem))))
    train(prepare(settings, out), out)


def _fill(settings, recipe):
    """Fills the cache of these settings."""
    if not settings.data.cache:
        raise SettingError("data.cache", "", f"the folder that the run of {recipe} will use")
    from sdjax.training.begin import begin

    there = replace(settings.class_data, draw=False)  # what a run will draw is not there yet
    _, _, data, _ = begin(replace(settings, class_data=there))
    print(f"{settings.data.cache}: {data.fill(settings.epochs or 1)}")


def _warm(settings, recipe):
    """Compiles the programs of these settings."""
    from sdjax.training.warm import warm

    start = time.monotonic()
    warm(settings)
    print(f"{recipe}: {time.monotonic() - start:.1f} s")


def _run(arguments, doc, prog, act):
    """Calls act(settings, recipe) for one recipe; returns the exit status."""
    if not arguments or list(arguments) == ["--help"]:
        print(doc.format(prog=prog, recipes=textwrap.fill(", ".join(recipes.known()), 118)))
        return 0
    name, *overrides = arguments
    watch.split()
    try:
        path = recipes.find(name)
        if "--help" in overrides:
            print(describe(path))
            return 0
        settings = load(path, overrides)
        compile_cache.keep(steps=settings.steps)
        processes.join()
        accelerator.check()
        from sdjax.training import checks

        act(checks.worded(settings), name)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:  # errors of the input; others are bugs
        said, status = f"error: {guard.line(error)}", 1
    except RuntimeError as error:
        if not processes.broken(error):
            raise
        said, status = f"error: {watch.LOST}", 1
    print(said, file=sys.stderr)
    return status
