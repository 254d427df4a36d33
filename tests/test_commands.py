"""The command lines of jobs, read by the programs that they name."""

import dataclasses
import shlex
import types

import numpy as np
import pytest
from PIL import Image

from sdjax.sampling.settings import TASKS
from sdjax.service import commands, orders, programs, teaching
from sdjax.service.library import Library
from sdjax.service.place import Place

UPLOAD = f"{'a' * 32}.png"


@pytest.fixture
def library(tmp_path):
    place = Place(tmp_path / "a folder", model="random:tiny", dtype="bfloat16").made()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place.root / "uploads" / UPLOAD)
    return Library(place)


ORDERS = [
    ("text2img", {"prompt": "it's a cat; $(ls) `x`\n\"two\"", "negative_prompt": "-x", "seed": 7, "size": "64x32"}),
    ("text2img", {"prompt": "a", "grammar": "a1111", "seamless": True, "adapter": ["<lora:ink:1>"][:0], "hires": 2.0,
                  "hires_prompt": "b", "guidance": -1.5}),
    ("inpaint", {"prompt": "a", "image": UPLOAD, "mask": UPLOAD, "margin": 4, "masked_content": "noise"}),
    ("interpolate", {"prompt": "a", "to_prompt": "b", "frames": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "values"), ORDERS)
def test_the_command_of_pictures_asks_for_the_same(library, task, values):
    order = orders.pictures(library, task, values, 1 if task == "interpolate" else 2)
    line = commands.of(library, types.SimpleNamespace(kind="pictures", request=order))
    program, name, *words = shlex.split(line)
    given = vars(programs.parser(task, None).parse_args(words))
    values = {
        one: value for one, value in given.items() if one in {field.name for field in dataclasses.fields(TASKS[task])}
    }
    asked = programs.asked(task, values, given.get("count", 1))
    wanted = orders.requests(library, order)
    assert (program, name) == ("sdjax", task) and len(asked) == len(wanted)
    for ours, theirs in zip(asked, wanted, strict=True):
        paths = {one: str(library.place.upload(value)) for one in ("image", "mask")
                 if (value := getattr(theirs.settings, one, None))}  # fmt: skip
        assert ours.settings == dataclasses.replace(theirs.settings, **paths)


def test_the_command_of_a_run_loads_the_same_settings(library):
    from sdjax.settings import load

    order = {"recipe": "lora", "data": {"drawn": "pocketland"}, "settings": {"steps": 7, "data.word": "a cat"}}
    line = commands.of(library, types.SimpleNamespace(kind="training", request=order))
    program, name, recipe, *items = shlex.split(line)
    made, wanted = load(recipe, items), teaching._loaded(library, order, "0" * 32)
    assert (program, name) == ("sdjax", "train") and dataclasses.replace(wanted, out=made.out) == made
    assert made.steps == 7 and made.data.word == "a cat"


def test_a_job_that_is_not_one_of_ours_has_none(library):
    for kind, request in (
        ("pictures", {}),
        ("pictures", {"task": "x", "settings": {}}),
        ("training", {"recipe": "../x"}),
    ):
        assert commands.of(library, types.SimpleNamespace(kind=kind, request=request)) == ""
