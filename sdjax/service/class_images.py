"""Draws class pictures from the untrained model for DreamBooth's prior preservation.

    made, there = draw(Train(model="pocket", data=..., class_data=ClassData(path="photos/dogs", count=200)))

They go to the run's class_data.path as class-00000.png, ..., with their prompts as captions, so training reads them
like any folder.  Other pictures in the folder count and stay.  A rerun makes the missing pictures and replaces its own
pictures of another model or other prompts.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sdjax import settings
from sdjax.data import sources
from sdjax.formats.storage import files
from sdjax.images import reading
from sdjax.runtime import accelerator, compile_cache, locks, processes, signals
from sdjax.service import batch, maker
from sdjax.settings import SettingError, prefixed
from sdjax.training import checks, recipes
from sdjax.training.base import LOADED

DOC = """Draws class pictures for a DreamBooth run from the model that the run will train.

    %(prog)s dreambooth data.path=photos/dog data.word="sks dog" class_data.path=dogs

Use the recipe and settings of the run.  The program fills class_data.path up to class_data.count pictures (200).  Your
own pictures there count; its own pictures from another model or prompt are replaced.  The prompts are
class_data.prompts, otherwise the subject's prompts without class_data.identifiers.  Rerun the command after any
interruption: it makes the missing pictures.  All devices of the machine share each batch."""
FOLDER = "class"  # in a run's folder
LIST, NAME = "class_images.jsonl", re.compile(r"class-\d{5}")
BATCH = 8  # pictures at once


def drawn(run: Any, out: Path) -> Any:
    """Returns the settings of a run with class_data.path, a folder that now has class_data.count pictures.

    out: the run's folder; class/ in it is the default of class_data.path.  One of several processes draws.
    Raises ValueError for settings that do not fit before it draws, and what `draw` raises.
    """
    folder = Path(run.class_data.path or out / FOLDER)
    made = replace(run, class_data=replace(run.class_data, path=str(folder)))
    checks.alone(made)
    with prefixed("class_data"):
        made.class_data.rows_of(made.data.batch)
    fresh, there = processes.led(lambda: _drawn(made, folder))
    processes.say(f"{folder}: {fresh} class pictures made, {there} already existed")
    return made


def _drawn(run, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return draw(run)


def draw(run: Any, more: dict[str, Any] | None = None, rows: int = BATCH) -> tuple[int, int]:
    """Draws the missing of class_data.count pictures into class_data.path; returns (made now, existed before).

    run: a run's settings (Train).  more: settings of the pictures, such as steps.  rows: pictures at once, spread over
    the machine's devices.
    Raises ValueError for a missing or locked folder, an empty prompt, and a picture that could not be made.
    """
    classes = run.class_data
    if not classes.path:
        raise SettingError("class_data.path", "", "a folder for the class pictures")
    folder = Path(classes.path)
    with locks.held(folder, "class_data.path"):
        there = _others(folder)
        lacking = max(classes.count - there, 0)
        if not lacking:
            return 0, there
        jobs = [(f"class-{i:05d}", prompt, i) for i, prompt in enumerate(prompts(run, lacking))]
        for name, prompt, _ in jobs:  # before the pictures, so that each has a caption
            _write(folder / f"{name}.txt", prompt)
        _write(folder / LIST, "".join(json.dumps({"name": n, "prompt": p, "seed": s}) + "\n" for n, p, s in jobs))
        own = {name: value for name in LOADED if (value := getattr(run, name))}
        usual = {"grammar": "plain", "clip_skip": run.clip_skip, **(more or {}), **own}
        usual |= {"model": run.model, "ema": run.model_ema}
        made, failed, kept = batch.run(batch.Folder(maker.Maker(), folder), folder / LIST, usual, rows)
        if failed:
            raise ValueError(f"{folder}: {failed} of {lacking} pictures were not made; see errors.jsonl there")
        return made, kept + there


def prompts(run: Any, count: int) -> list[str]:
    """Returns `count` class prompts: class_data.prompts in turn, else the subject's prompts without its identifier.

    Raises ValueError for an empty prompt, and for subject's prompts without an identifier.
    """
    classes = run.class_data
    if classes.prompts:
        return [classes.prompts[i % len(classes.prompts)] for i in range(count)]
    source = sources.open(run.data)
    if not classes.changes(source, len(source)):
        wanted = "words that the subject's prompts hold, or class_data.prompts: what to draw"
        raise SettingError("class_data.identifiers", classes.identifiers, wanted)
    made = [classes.prompt(source.caption(i % len(source), np.random.default_rng((run.seed, i)))) for i in range(count)]
    if not all(made):
        wanted = "what to draw: a subject's prompt is empty without its identifier"
        raise SettingError("class_data.prompts", classes.prompts, wanted)
    return made


def _others(folder):
    """Returns how many pictures in a folder another program made."""
    if not any(path.suffix.lower() in reading.SUFFIXES for path in folder.rglob("*")):
        return 0
    return sum(not NAME.fullmatch(item.path.stem) for item in reading.find(folder))


def _write(path, text):
    """Writes a text completely or not at all, unless the file has it already."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with files.new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str], prog: str = "sdjax class_images") -> int:
    """Draws the class pictures of a recipe; returns 0, 1 after printing an error, or 130 and 143 as batch.main.

    prog: the program's name in its help.
    """
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=DOC, formatter_class=how)
    parser.add_argument("recipe", help="the run's recipe, such as dreambooth, or a Python file with config()")
    parser.add_argument("changes", nargs="*", metavar="a.b=value", help="the settings that the run will have")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures at once")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the pictures: steps=50")
    given = parser.parse_intermixed_args(arguments)
    return signals.ended(lambda: _main(given), "start again to go on")


def _main(given: argparse.Namespace) -> int:
    """Draws the class pictures of a command line; see main."""
    try:
        more = dict(text.partition("=")[::2] for text in given.set)
        compile_cache.keep()
        accelerator.check()
        made, there = draw(settings.load(recipes.find(given.recipe), given.changes), more, given.batch)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{made} class pictures made, {there} already existed")
    return 0
