"""The program that trains: a recipe and overrides in, a run's folder out."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdjax.settings import describe, load

USAGE = "usage: sdjax train CONFIG [a.b=value ...] [out=DIR]; CONFIG --help says what it does, and all its settings"


def main(arguments: Sequence[str], doc: str = USAGE) -> int:
    """Runs one config; returns the exit status.  doc: what --help without a config shows."""
    if not arguments or list(arguments) == ["--help"]:
        print(doc)
        return 0
    path, *overrides = arguments
    try:
        if "--help" in overrides:
            print(describe(path))
            return 0
        settings = load(path, overrides)
        from sdjax.runtime import compile_cache
        from sdjax.training import checks, run
        from sdjax.training.loop import train

        compile_cache.keep(steps=settings.steps)
        settings = checks.worded(settings)
        train(settings, run.place(settings, Path("outputs") / Path(path).stem))
    except (ValueError, OSError, FloatingPointError) as error:  # what input can cause; the rest are bugs
        print(f"error: {_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same line goes on from the newest checkpoint, where there is one", file=sys.stderr)
        return 130
    return 0


def _line(error):
    """Returns an error's message on one line; libraries may write several."""
    return " ".join(str(error).split()) or type(error).__name__
