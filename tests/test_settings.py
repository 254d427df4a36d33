"""Recipes, overrides and JSON of settings."""

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from sdjax import settings


@dataclass(frozen=True)
class Part:
    rank: int = 4
    lr: float = 1e-3
    word: str = ""


@dataclass(frozen=True)
class Both:
    parts: tuple = (Part(), Part(rank=8))


@dataclass(frozen=True)
class Pair:
    low: int = 0
    high: int = 1

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError(f"pair.low={self.low}: must be below {self.high}")


@dataclass(frozen=True)
class Run:
    method: object = field(default_factory=Both)
    part: Part | None = None
    pair: Pair = field(default_factory=Pair)
    betas: tuple[float, float] = (0.9, 0.999)
    prompts: tuple[str, ...] = ()
    rates: tuple[tuple[str, float], ...] = (("to_k", 1.0),)
    clip: float | None = 1.0
    name: str | None = None
    size: int | str = 0
    mode: Literal["single", "mesh"] = "single"
    flip: bool = True
    text: str = "x"
    steps: int = 10


CLASSES = {c.__name__: c for c in (Run, Part, Both, Pair)}


def changed(*items):
    return settings.override(Run(), items)


@pytest.mark.parametrize(
    ("item", "read", "value"),
    [
        ("steps=7", lambda c: c.steps, 7),
        ("steps=1_000", lambda c: c.steps, 1000),
        ("method.parts.1.rank=16", lambda c: [p.rank for p in c.method.parts], [4, 16]),
        ("method.parts.0.lr=1", lambda c: c.method.parts[0].lr, 1.0),
        ("betas=(0, 0.99)", lambda c: c.betas, (0.0, 0.99)),
        ("betas=[0.5, 0.6]", lambda c: c.betas, (0.5, 0.6)),
        ("betas.1=0.5", lambda c: c.betas, (0.9, 0.5)),
        ("prompts=('a, b', 'c')", lambda c: c.prompts, ("a, b", "c")),
        ("prompts=()", lambda c: c.prompts, ()),
        ("rates=(('to_q', 2),)", lambda c: c.rates, (("to_q", 2.0),)),
        ("rates.0.1=2", lambda c: c.rates, (("to_k", 2.0),)),
        ("clip=None", lambda c: c.clip, None),
        ("clip=3", lambda c: c.clip, 3.0),
        ("name=none", lambda c: c.name, None),
        ("name=12", lambda c: c.name, "12"),
        ("size=64", lambda c: c.size, 64),
        ("size=model", lambda c: c.size, "model"),
        ("mode=mesh", lambda c: c.mode, "mesh"),
        ("flip=false", lambda c: c.flip, False),
        ("text=None", lambda c: c.text, "None"),
        ("text=true", lambda c: c.text, "true"),
        ("text=(1, 2)", lambda c: c.text, "(1, 2)"),
        ("text='quoted'", lambda c: c.text, "quoted"),
        ("text=a=b", lambda c: c.text, "a=b"),
        ("text=", lambda c: c.text, ""),
    ],
)
def test_override_reads_the_fields_type(item, read, value):
    found = read(changed(item))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("stesp=3", ("stesp", "did you mean 'steps'")),
        ("method.parts.0.rnak=3", ("method.parts.0.rnak", "Part", "'rank'")),
        ("method.parts.2.rank=3", ("method.parts.2", "2 items")),
        ("method.parts.x.rank=3", ("method.parts.x", "2 items")),
        ("method=3", ("method=3", "Both", "parts")),
        ("steps=2.5", ("steps=2.5", "int")),
        ("steps=True", ("steps=True", "int")),
        ("flip=1", ("flip=1", "bool")),
        ("clip=fast", ("clip=fast", "float or None")),
        ("clip=(1,", ("clip=(1,", "float")),
        ("betas=(1,)", ("betas", "tuple[float, float]")),
        ("prompts=a cat", ("prompts=a cat", "('a', 'b')")),
        ("mode=pmap", ("mode=pmap", "single")),
        ("steps.x=1", ("steps.x", "10", "no fields")),
        ("part.rank=1", ("part.rank", "None")),
        ("steps", ("'steps'", "name=value")),
        ("=3", ("name=value",)),
        ("pair.low=5", ("pair.low=5", "below 1")),
    ],
)
def test_override_refuses_in_one_line(item, words):
    with pytest.raises(ValueError) as error:
        changed(item)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_fields_that_belong_together_change_together():
    assert changed("pair.low=5", "pair.high=9").pair == Pair(5, 9)


def test_a_later_override_wins_and_a_mixed_one_is_refused():
    assert changed("steps=1", "steps=2").steps == 2
    for items in (("betas=(1, 2)", "betas.0=3"), ("betas.0=3", "betas=(1, 2)")):
        with pytest.raises(ValueError, match="betas"):
            changed(*items)


def test_json_round_trip_keeps_values_and_types():
    run = changed("method.parts.1.rank=16", "prompts=('a',)", "rates=(('to_q', 2),)", "clip=None")
    data = json.loads(json.dumps(settings.to_json(run)))
    assert data["class"] == "Run" and data["method"]["parts"][1] == {
        "class": "Part",
        "rank": 16,
        "lr": 1e-3,
        "word": "",
    }
    again = settings.from_json(data, CLASSES)
    assert again == run and hash(again) == hash(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class": "os.system"}, ("os.system", "Part")),
        ({"pair": {"class": "subprocess.Popen"}}, ("pair.class", "Popen")),
        ({"stpes": 3}, ("stpes", "'steps'")),
        ({"steps": "3"}, ("steps", "int")),
        ({"pair": {"class": "Pair", "low": 4}}, ("pair.low=4",)),
        ({"betas": [0.1]}, ("betas", "tuple[float, float]")),
    ],
)
def test_from_json_refuses(change, words):
    with pytest.raises(ValueError) as error:
        settings.from_json({**settings.to_json(Run()), **change}, CLASSES)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("value", [print, float("nan"), {1: 2}, {"class": "x"}])
def test_to_json_refuses_what_json_cannot_hold(value):
    with pytest.raises(ValueError, match="method"):
        settings.to_json(Run(method=value))


def test_to_json_writes_paths_as_text():
    assert settings.to_json(Run(method=Path("a") / "b"))["method"] == "a/b"


def test_load_runs_config_and_applies_overrides(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Run:\n    steps: int = 3\n\n\n"
        "def config():\n    return Run(steps=5)\n"
    )
    assert settings.load(recipe).steps == 5
    assert settings.load(str(recipe), ["steps=6"]).steps == 6


def test_load_refuses_a_missing_file_and_one_without_config(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        settings.load(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"no function config\(\)"):
        settings.load(tmp_path / "empty.py")


def test_setting_errors_say_name_value_and_what_is_accepted():
    error = settings.SettingError("clip_skip", np.int64(0), "a whole number, 1 or more")
    assert isinstance(error, ValueError) and str(error) == "clip_skip=0: expected a whole number, 1 or more"
    assert error.line(lambda name: f"--{name.replace('_', '-')}") == "--clip-skip=0: expected a whole number, 1 or more"
    error = settings.SettingError("ensd", 5, "0", "noise_source='jax' has none")
    assert str(error) == "ensd=5: noise_source='jax' has none; expected 0"
    assert str(error.under("noise")) == "noise.ensd=5: noise_source='jax' has none; expected 0"
    assert (
        str(settings.SettingError("steps", settings.UNSAID, "a number", "missing"))
        == "steps: missing; expected a number"
    )
    assert len(str(settings.SettingError("prompt", "x\n" * 999, "less"))) < 100
    assert pickle.loads(pickle.dumps(error)).line() == error.line()
