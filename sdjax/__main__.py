"""The program `sdjax`: every program of sample/ and train/ under one name; `sdjax --help` lists them."""

import functools
import sys
from collections.abc import Sequence

TASKS = {
    "text2img": "Makes pictures from a prompt.",
    "img2img": "Makes pictures from a picture and a prompt.",
    "inpaint": "Repaints the masked part of a picture.",
    "upscale": "Enlarges a picture with an upscaling model.",
    "controlnet": "Makes pictures that follow the shapes of another picture.",
    "interpolate": "Makes frames between two prompts or seeds, and an animation of them.",
}
HELP = """usage: sdjax COMMAND ...

{}

    sdjax text2img --prompt "a photo of a face"
    sdjax train lora data.path=photos/cat data.word=cat
    sdjax ui --models models --adapters adapters

sdjax COMMAND --help lists the options of a command."""
TUNE = """usage: sdjax tune PHOTO [model=MODEL] [a.b=value ...] [out=DIR]

{} MODEL is pocket or a model with an e4t/ folder.

    sdjax tune photo.png model=MODEL steps=10"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program that the first argument names; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (given[0], given[1:]) if given else ("--help", [])
    programs = {task: functools.partial(_draw, task) for task in TASKS}
    programs |= OTHERS
    if name in programs:
        return programs[name](rest)
    print(HELP.format("\n".join(f"    {name:<13}{text}" for name, text in about().items())))
    if name in ("--help", "-h"):
        return 0
    print(f"error: {name!r}: expected one of {', '.join(programs)}", file=sys.stderr)
    return 2


def about() -> dict[str, str]:
    """Returns {command: what it does}."""
    return {**TASKS, **{name: (run.__doc__ or "").splitlines()[0] for name, run in OTHERS.items()}}


def _draw(task: str, rest: list[str]) -> int:
    from sdjax.service.programs import main as draw

    return draw(task, TASKS[task], rest, f"sdjax {task}")


def _batch(rest: list[str]) -> int:
    """Makes the pictures of a list; a rerun makes the missing ones."""
    from sdjax.runtime import watch

    watch.split()
    from sdjax.service.batch import main as batch

    return batch(about()["batch"], rest, "sdjax batch")


def _train(rest: list[str]) -> int:
    """Trains a recipe, such as lora."""
    from sdjax.service.train_program import main as train

    return train(rest)


def _tune(rest: list[str]) -> int:
    """Personalizes a model with an E4T encoder from one photo."""
    if not rest or "=" in rest[0] or rest[0].startswith("-"):
        asked = rest[:1] == ["--help"]
        print(TUNE.format(about()["tune"]), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    photo, *more = rest
    # Pocket has a recipe of its own.
    model = next((one.partition("=")[2] for one in reversed(more) if one.startswith("model=")), "pocket")
    recipe = "pocket/tune" if model == "pocket" else "e4t_tune"
    return _train([recipe, f"model={model}", f"init={model}", f"data.path={photo}", *more])


def _demo(rest: list[str]) -> int:
    """Personalizes the embedded model from one picture and draws a sheet of its subject."""
    from sdjax.service.demo import main as demo

    return demo(rest)


def _cache(rest: list[str]) -> int:
    """Fills a run's cache before it trains."""
    from sdjax.training.program import fill

    return fill(rest)


def _class_images(rest: list[str]) -> int:
    """Draws class pictures for a DreamBooth run."""
    from sdjax.service.class_images import main as class_images

    return class_images(rest)


def _vocabulary(rest: list[str]) -> int:
    """Lists a model's rare words, or builds the embedded model's vocabulary."""
    from sdjax.service.vocabulary import main as vocabulary

    return vocabulary(rest)


def _convert(rest: list[str]) -> int:
    """Converts a model or exports a run."""
    from sdjax.convert import main as convert

    return convert(rest)


def _warm(rest: list[str]) -> int:
    """Compiles a model's programs ahead, so that its first picture does not wait."""
    from sdjax.service.warm import main as warm

    return warm(rest)


def _adapters(rest: list[str]) -> int:
    """Checks, merges, resizes or extracts adapter files."""
    from sdjax.service.adapters import main as adapters

    return adapters(rest)


def _ui(rest: list[str]) -> int:
    """Serves the web page and the APIs on http://127.0.0.1:7860."""
    try:
        from sdjax.web.server import main as serve
    except ImportError as error:
        print(f"error: sdjax ui needs {error.name}: pip install -e '.[ui]'", file=sys.stderr)
        return 2
    return serve(about()["ui"], rest)


OTHERS = {
    "batch": _batch,
    "train": _train,
    "tune": _tune,
    "demo": _demo,
    "cache": _cache,
    "class_images": _class_images,
    "vocabulary": _vocabulary,
    "convert": _convert,
    "adapters": _adapters,
    "ui": _ui,
    "warm": _warm,
}


if __name__ == "__main__":
    sys.exit(main())
