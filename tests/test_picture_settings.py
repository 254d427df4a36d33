"""The settings of pictures: one declaration each, from which flags, rows, records, errors and schemas follow."""

import ast
import json
from pathlib import Path
from typing import Annotated

import pydantic
import pytest
from annotated_types import Interval

from sdjax.sampling import settings
from sdjax.sampling.fields import Choice, Setting, Size, declared, fields, make
from sdjax.sampling.settings import TASKS, Inpaint, TextToImage, Upscale
from sdjax.service import flags, lists, programs, records
from sdjax.settings import SettingError

ROOT = Path(__file__).parents[1]
# The layers that a setting passes through, from what is asked for to what acts.
LAYERS = [*sorted((ROOT / "sdjax/sampling").glob("*.py")), *sorted((ROOT / "sdjax/service").glob("*.py"))]
# Names that are words of other things too: of arrays, functions, noise schedules, texts, parts of models.
COMMON = {
    "size",
    "seed",
    "steps",
    "prompt",
    "negative_prompt",
    "start",
    "end",
    "weight",
    "strength",
    "resize",
}
COMMON |= {"variation", "dtype", "tile", "overlap", "guidance", "grammar", "hires"}
# Asked for by the layer that opens files, and by the one that acts; `hires_method` also by who reads A1111's records.
TWICE = {"adapter", "model", "vae", "image", "mask", "control", "control_image", "hires_method"}


@declared
class Mood:
    mood: Annotated[float, Interval(ge=0, le=1), Setting("how merry it is", "Mood", "mood")] = 0.5
    tone: Annotated[str, Choice(red="Red", blue="Blue"), Setting("of the whole", "Tone")] = "red"


@declared
class Moody(TextToImage, Mood):
    steps = 30


@pytest.fixture
def moody(monkeypatch):
    monkeypatch.setitem(TASKS, "text2img", Moody)
    monkeypatch.setitem(settings.NAMES, Moody, "text2img")
    monkeypatch.setattr(lists, "KNOWN", lists.KNOWN | fields(Moody))


def test_a_new_setting_is_a_flag_a_field_a_word_and_in_the_schema(moody, tmp_path, capsys):
    """Nothing but its declaration is added, and one that a task inherits has another usual value by a line."""
    with pytest.raises(SystemExit):
        programs.main("text2img", "", ["--help"])
    help_ = " ".join(capsys.readouterr().out.split())
    assert "--mood MOOD how merry it is; 0 to 1; default: 0.5" in help_
    assert "--tone TONE of the whole; one of red, blue; default: red" in help_ and "default: 30" in help_
    given = vars(programs.parser("text2img", "").parse_args(["--prompt", "a", "--mood", "0.25", "--tone", "Blue"]))
    (asked,) = programs.asked("text2img", {name: given[name] for name in ("prompt", "mood", "tone")}, 1)
    assert (asked.settings.mood, asked.settings.tone, asked.settings.steps) == (0.25, "blue", 30)
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "mood": [0.25, 2]}\n{"prompt": "a", "mood": "0.1|1"}')
    rows, errors = lists.read(tmp_path / "jobs.jsonl")
    assert [row.settings.mood for row in rows] == [0.1, 1.0]
    assert errors == [{"row": 1, "error": "mood=2: expected 0 to 1"}]
    record = records.of(asked.settings, (8, 8))
    assert "Mood: 0.25, Tone: Blue" in records.text(record)
    assert records.parse(records.text(record)) == record == records.from_json(records.to_json(record))
    assert records.request(record).mood == 0.25
    schema = pydantic.TypeAdapter(Moody).json_schema()["properties"]["mood"]
    assert schema == {
        "default": 0.5,
        "description": "how merry it is",
        "maximum": 1,
        "minimum": 0,
        "title": "Mood",
        "type": "number",
    }


def names(path):
    """Returns the identifiers, keywords, attributes and texts of a module, docstrings left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Name, ast.Attribute, ast.arg, ast.keyword)):
            found.add(getattr(node, {ast.Name: "id", ast.Attribute: "attr"}.get(type(node), "arg")))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_every_setting_is_named_where_it_is_declared_and_where_it_acts():
    said = {path.relative_to(ROOT / "sdjax").as_posix(): names(path) for path in LAYERS}
    declared_ = {name for task in TASKS.values() for name in fields(task)}
    places = {name: sorted(path for path, words in said.items() if name in words) for name in declared_}
    assert all("sampling/settings.py" in found for found in places.values())
    assert {name: found for name, found in places.items() if len(found) > 2 and name not in COMMON | TWICE} == {}
    assert len(declared_ - COMMON - TWICE) > 20


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_words_for_all_its_settings(task):
    for name, one in fields(TASKS[task]).items():
        assert (
            one.about.help and one.accepted and (one.about.word or name in ("prompt", "negative_prompt", "tokenizer"))
        )
    words = [one.about.word for one in fields(TASKS[task]).values() if one.about.word]
    assert len(words) - len(set(words)) == (task == "controlnet")  # A1111's "Denoising strength" is of two
    json.dumps(pydantic.TypeAdapter(TASKS[task]).json_schema())


@pytest.mark.parametrize(
    ("task", "values", "said"),
    [
        (TextToImage, {"prompt": "a", "steps": "0"}, "steps='0': expected a whole number, 1 or more"),
        (TextToImage, {"prompt": "a", "negativ_prompt": ""}, "negativ_prompt: unknown; expected negative_prompt"),
        (TextToImage, {}, "prompt: missing; expected a text"),
        (TextToImage, {"prompt": "a", "hires_steps": 3}, "hires_steps=3: expected together with hires"),
        (TextToImage, {"prompt": "a", "hires": "1e400"}, "hires='1e400': expected more than 0, to 64"),
        (Inpaint, {"prompt": "a", "image": "a.png"}, "mask: missing; expected a text"),
        (Upscale, {"image": "a.png", "noise_level": 351}, "noise_level=351: expected a whole number, 0 to 350"),
    ],
)
def test_what_is_not_accepted_is_one_line(task, values, said):
    with pytest.raises(SettingError) as error:
        make(task, values, text=True)
    assert str(error.value) == said
    assert error.value.line(flags.flag).startswith(flags.flag(error.value.name))


def test_sizes_are_pairs_written_width_first():
    for value in ((96, 64), "64x96", "64X96", [96, 64]):
        assert TextToImage(size=value).size == Size(96, 64) == (96, 64)
    assert TextToImage(size=64).size == TextToImage(size="64").size == (64, 64) and str(Size(96, 64)) == "64x96"


def test_a_preset_is_a_size():
    assert Upscale(preset="64-256").size == (64, 64) and Upscale(preset="128-512", size=7).size == (128, 128)


def test_seeds_count_on_and_minus_one_is_drawn():
    plain, varied = TextToImage(seed=7), TextToImage(seed=7, variation_seed=3, variation=0.1)
    assert [plain.numbered(i).seed for i in range(3)] == [7, 8, 9]
    assert [(varied.numbered(i).seed, varied.numbered(i).variation_seed) for i in range(2)] == [(7, 3), (7, 4)]
    drawn = TextToImage(seed=-1, variation_seed=-1).drawn()
    assert 0 <= drawn.seed != drawn.variation_seed >= 0 and plain.drawn() is plain
