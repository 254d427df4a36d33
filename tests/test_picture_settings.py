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
DECLARED = {name for task in TASKS.values() for name in fields(task)}
MAKES = {*(task.__name__ for task in TASKS.values()), "make", "drawn", "numbered", "again", "saying", "wordless"}


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
    assert "1 is off; default: 7.5" in help_ and "usage: " in help_ and "[options]" in help_  # every number is accepted
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


def held(node, bound):
    """Returns whether an expression is settings: job.settings, TextToImage(...), replace(made, ...), a name of such."""
    if isinstance(node, ast.Name):
        return node.id in bound
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return name in MAKES or name == "replace" and bool(node.args) and held(node.args[0], bound)
    return isinstance(node, ast.Attribute) and node.attr == "settings"


def holders(tree):
    """Returns the names in a module that stand for settings, or for {name: value} of all of them."""
    bound, known = set(), {"Task", *MAKES}
    for node in ast.walk(tree):
        if isinstance(node, ast.alias) and node.name in known:
            known.add(node.asname or node.name)
    for _ in range(3):  # a name may come from another
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.annotation is not None:
                said = {getattr(one, "attr", getattr(one, "id", "")) for one in ast.walk(node.annotation)}
                bound |= {node.arg} if said & known else set()
            pairs = []
            if isinstance(node, ast.Assign):
                pairs = [(target, node.value) for target in node.targets]
            elif isinstance(node, (ast.comprehension, ast.For)) and getattr(node.iter, "attr", "") == "pictures":
                bound |= {getattr(node.target, "id", "")}
            for target, value in pairs:
                several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                for one, of in zip(target.elts, value.elts, strict=False) if several else [(target, value)]:
                    whole = isinstance(of, ast.DictComp) and isinstance(of.value, ast.Call) and reads(of.value, bound)
                    bound |= {one.id} if isinstance(one, ast.Name) and (held(of, bound) or whole) else set()
    return bound


def reads(call, bound):
    """Returns whether a call is getattr(settings, ...)."""
    return getattr(call.func, "id", "") == "getattr" and held(call.args[0], bound)


def uses(path):
    """Returns the settings that a module reads of settings, changes in them, or names in errors.

    Who gives values, TextToImage(prompt=...), only asks.
    """
    tree, found = ast.parse(path.read_text()), set()
    bound = holders(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and held(node.value, bound):
            found.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and held(node.value, bound):
            found.add(node.slice.value)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            of = held(node.func.value, bound) if isinstance(node.func, ast.Attribute) else False
            first = node.args[1:2] if reads(node, bound) else node.args[:1]
            if name in ("SettingError", "each") or reads(node, bound) or name in ("get", "pop") and of:
                found |= {one.value for one in first if isinstance(one, ast.Constant)}
            if name == "replace" and held(node, bound):
                found |= {one.arg for one in node.keywords}
    return found & DECLARED


def test_every_setting_is_named_where_it_is_declared_and_where_it_acts():
    """In at most two modules; words that are of other things too count where they are read of settings."""
    where = {path.relative_to(ROOT / "sdjax").as_posix(): path for path in LAYERS}
    home = {place for place in where if place.endswith("settings.py")}  # a setting is in one of them
    named = {place: names(path) for place, path in where.items()}
    used = {place: uses(path) for place, path in where.items() if place not in home}
    said = {name: [place for place, words in named.items() if name in words] for name in DECLARED}
    acts = {name: [place for place, words in used.items() if name in words] for name in DECLARED}
    assert all(home & set(found) for found in said.values())
    assert {name: acts[name] for name, found in said.items() if len(found) > 2 and len(acts[name]) > 1} == {}
    assert sum(len(found) <= 2 for found in said.values()) > 20


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("def run(job):\n    shared, z = job.settings, 1\n    return shared.steps + plan.steps + z.size", {"steps"}),
        ("def of(made: settings.Task):\n    return getattr(made, 'hires', None), sd.networks['vae']", {"hires"}),
        ("few = [replace(one, seed=1) for one in job.pictures]\ngrid = replace(page, size=2)", {"seed"}),
        ("raise SettingError('size', value, 'a pair')\nrow = {'mask': None}", {"size"}),
        ("about = {n: getattr(made, n) for n in known for made in job.pictures}\nload(about['vae'], Task())", {"vae"}),
        ("from x import ControlNet as Asked\ndef of(made: Asked):\n    return made.start, text.end", {"start"}),
    ],
)  # fmt: skip
def test_uses_of_settings_are_told_from_other_words(code, found, tmp_path):
    (tmp_path / "module.py").write_text(code)
    assert uses(tmp_path / "module.py") == found


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
