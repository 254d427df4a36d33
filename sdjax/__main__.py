"""The program `sdjax`: every program of sample/ and train/ under one name.

    sdjax text2img --prompt "a photo of a face"
    sdjax batch jobs.jsonl --out pictures
    sdjax train RECIPE.py [a.b=value ...] [out=DIR]
    sdjax tune photo.png [a.b=value ...]
    sdjax convert SRC DST
    sdjax adapters merge | extract | resize | check ...
    sdjax ui [--models DIR] [--adapters DIR]         the web page and its APIs on http://127.0.0.1:7860

Each command has its own --help.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

TASKS = ("text2img", "img2img", "inpaint", "upscale", "controlnet", "interpolate")
RECIPES = Path(__file__).parents[1] / "configs"  # of a checkout; an installed package has none


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program that the first argument names; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (given[0], given[1:]) if given else ("--help", [])
    programs = {task: functools.partial(_draw, task) for task in TASKS}
    programs |= {"batch": _batch, "train": _train, "tune": _tune, "convert": _convert}
    programs |= {"adapters": _adapters, "ui": _ui}
    if name in programs:
        return programs[name](rest)
    print((__doc__ or "").strip())
    if name in ("--help", "-h"):
        return 0
    print(f"error: {name!r}: expected one of {', '.join(programs)}", file=sys.stderr)
    return 2


def _draw(task: str, rest: list[str]) -> int:
    from sdjax.service.programs import main as draw

    return draw(task, f"sdjax {task}", rest)


def _batch(rest: list[str]) -> int:
    from sdjax.runtime import watch

    watch.split()
    from sdjax.service.batch import main as batch

    return batch("sdjax batch", rest)


def _train(rest: list[str]) -> int:
    from sdjax.training.program import main as train

    return train(rest)


def _tune(rest: list[str]) -> int:
    """Tunes on one photo, with pocket's recipe or, given model=NAME, with the one for other models."""
    if not rest or "=" in rest[0] or rest[0].startswith("-"):
        print("usage: sdjax tune PHOTO [model=MODEL] [a.b=value ...] [out=DIR]", file=sys.stderr)
        return 0 if rest[:1] == ["--help"] else 2
    photo, *more = rest
    model = next((one.partition("=")[2] for one in reversed(more) if one.startswith("model=")), "pocket")
    recipe = RECIPES / ("pocket/tune.py" if model == "pocket" else "e4t_tune.py")
    return _train([str(recipe), f"model={model}", f"init={model}", f"data.path={photo}", *more])


def _convert(rest: list[str]) -> int:
    from sdjax.convert import main as convert

    return convert(rest)


def _adapters(rest: list[str]) -> int:
    from sdjax.service.adapters import main as adapters

    return adapters(rest)


def _ui(rest: list[str]) -> int:
    try:
        from sdjax.web.server import main as serve
    except ImportError as error:
        print(f"error: sdjax ui needs {error.name}: pip install -e '.[ui]'", file=sys.stderr)
        return 2
    return serve("sdjax ui", rest)


if __name__ == "__main__":
    sys.exit(main())
