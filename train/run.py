"""Trains any method.

    python train/run.py CONFIG [a.b=value ...] [out=DIR]

CONFIG is a Python file with a function config(), such as configs/textual_inversion.py; every setting can be changed on
the command line, e.g. optim.lr=1e-4 method.vectors=2 data.path=photos/cat.  DIR (default: the config's own, else
outputs/NAME of the config; with {picture} in it a folder for each picture) gets config.json origin.json metrics.jsonl
checkpoints/ samples/ export/.  Run the same line again and it goes on from the newest checkpoint.

    python train/run.py CONFIG --help      what the config does, and all its settings
"""

import sys
from pathlib import Path

from sdjax.settings import describe, load


def main(arguments):
    """Runs one config; returns the exit status."""
    if not arguments or arguments == ["--help"]:
        print(__doc__)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
