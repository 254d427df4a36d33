"""The training program: a recipe and overrides in, a run's folder out."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdjax.runtime import accelerator, compile_cache, guard, processes, watch
from sdjax.settings import SettingError, describe, load

USAGE = "usage: sdjax train CONFIG [a.b=value ...] [out=DIR]; CONFIG --help describes the recipe and every setting"


def main(arguments: Sequence[str], doc: str = USAGE) -> int:
    """Runs one recipe; returns the exit status.  doc: the text of --help without a recipe."""
    return processes.ended(lambda: _run(arguments, doc, _train))


def fill(arguments: Sequence[str], doc: str) -> int:
    """Fills the cache of one recipe; returns the exit status."""
    return processes.ended(lambda: _run(arguments, doc, _fill))


def _train(settings, recipe):
    """Trains with the settings of a recipe."""
    from sdjax.training import run_folder
    from sdjax.training.loop import train

    train(settings, processes.led(lambda: str(run_folder.place(settings, Path("outputs") / Path(recipe).stem))))


def _fill(settings, recipe):
    """Computes what the cache of these settings lacks."""
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
    except (ValueError, OSError, FloatingPointError) as error:  # what input can cause; the rest are bugs
        said, status = f"error: {guard.line(error)}", 1
    except KeyboardInterrupt:
        said, status = "interrupted; rerun the command to resume from the newest checkpoint", 130
    except RuntimeError as error:
        if not processes.broken(error):
            raise
        said, status = f"error: {watch.LOST}", 1
    print(said, file=sys.stderr)
    return status
