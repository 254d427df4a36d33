"""The comparison of ways: their settings, what tunes, and what is told of figures."""

import argparse
import functools
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.formats import pipeline
from sdjax.training.loop import train

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compare
import curves
import subjects
import ways
from published import added, published
from test_likeness import clip_folder
from tuning import Tuner


@pytest.mark.parametrize("name", ways.POCKET)
def test_prompts_say_what_a_way_trains(name):
    for model, domain in (("pocket", "face"), ("random:tiny", "cat")):
        way = ways.of(model, domain)[name]
        told = way.settings(model, "photos")
        assert (told.model, told.data.path, told.checkpoint) == (model, "photos", 0)
        assert told.init == (model if "E4T" in name else "")
        assert (told.data.word or told.method.words[0]) == way.word


@pytest.mark.slow
def test_a_tuner_learns_what_a_run_learns(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
    told = functools.partial(ways.of("random:tiny", "face")["LoRA, 5"].settings, more=("steps=3", "data.batch=2"))
    tuner = Tuner(told, "random:tiny")
    stages = list(tuner.stages(tmp_path, marks=(1,)))
    assert [steps for steps, _, _ in stages] == [1, 3]
    whole = train(told("random:tiny", str(tmp_path)), tmp_path / "run")
    one, last = (stage[1].parts["unet"] for stage in stages)
    for mine, its in zip(jax.tree.leaves(last), jax.tree.leaves(whole.parts["unet"]), strict=True):
        np.testing.assert_array_equal(mine, its)
    assert any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(last), strict=True))
    found = stages[-1][2]
    assert found["bytes"] > 0 and found["memory"] > 0 and found["processor"] > 0 and "compilation" in found
    assert stages[0][2]["seconds"] < found["seconds"]
    assert "compilation" not in tuner(tmp_path)[1]  # of the first subject alone


def test_kept_pictures_are_of_the_same_settings(tmp_path):
    path, told = tmp_path / "a.npz", {"steps": 3, "word": ("a",)}
    assert compare.held(path, told) is None
    np.savez(path, pictures=np.zeros(2), figures=json.dumps({"steps": 3}), told=json.dumps(told))
    pictures, figures = compare.held(path, told)
    assert figures == {"steps": 3} and pictures.shape == (2,)
    assert compare.held(path, {**told, "steps": 4}) is None


def test_kept_pictures_are_of_the_same_photos_and_model(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(compare, "pictures", lambda *_: made.append(1) or np.zeros(2))
    options = argparse.Namespace(prompts=4, seeds=1, model="pocket", marks=(), out=tmp_path, split="own")
    for photo, model, count in ((1, "pocket", 1), (1, "pocket", 1), (2, "pocket", 2), (2, "other", 3)):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("L", (8, 8), photo).save(tmp_path / "photos" / "0.png")
        options.model = model
        subject = subjects.Subject(tmp_path / "photos", "face", "a face")
        compare.made_of(subject, compare.BASE, None, None, None, options)
        assert len(made) == count


def test_identity_is_0_for_others_and_1_for_the_person():
    rows = [{"s": s, "s0": 0.1, "s1": 0.9, "prompts": 1.0, "steps": 0} for s in (0.1, 0.9)]
    table = compare.summary(rows)
    assert table["identity"] == 0.5 and table["identity, 95 %"] == [0.0, 1.0] and table["prompts"] == 1.0


def test_documents_keep_the_rows_of_other_ways_that_were_asked_the_same(tmp_path):
    asked, sheet = {"people": 8}, Image.new("RGB", (4, 4))
    told, picture = compare.documented(tmp_path, {compare.BASE: {"steps": 0}, "LoRA, 5": {"steps": 1}}, asked, sheet)
    assert picture is None  # other ways lack
    published(tmp_path, "compare", told, picture)
    told, _ = compare.documented(tmp_path, {"DreamBooth, 1": {"steps": 2}, "LoRA, 5": {"steps": 3}}, asked, sheet)
    steps = [(name, row["steps"]) for name, row in told["table"].items()]
    assert steps == [(compare.BASE, 0), ("DreamBooth, 1", 2), ("LoRA, 5", 3)]
    told, picture = compare.documented(tmp_path, dict.fromkeys(ways.POCKET, {}), {"people": 2}, sheet)
    assert list(told["table"]) == list(ways.POCKET) and picture is sheet
    published(tmp_path, "compare", told, picture)
    with Image.open(tmp_path / "compare.webp") as drawn:
        assert drawn.size == (4, 4)


def test_figures_are_added_beside_those_of_a_file(tmp_path):
    for figures in ({"b": 1, "c": 1}, {"a": 2, "c": 2}):
        added(tmp_path / "figures.json", figures)
    assert list(json.loads((tmp_path / "figures.json").read_text()).items()) == [("a", 2), ("b", 1), ("c", 2)]


def test_seconds_at_equal_identity():
    quick = [{"seconds": 0.0, "identity": 0.0}, {"seconds": 2.0, "identity": 0.8}]
    slow = [{"seconds": 1.0, "identity": 0.2}, {"seconds": 5.0, "identity": 0.4}, {"seconds": 9.0, "identity": 0.6}]
    (row,) = curves.compared({"quick": quick, "slow": slow})
    assert row == {"identity": 0.6, "quick": 1.5, "slow": 9.0}
    assert math.isnan(curves.seconds_at(slow, 0.7))


def protocol(folder, names=("vase", "cat2")):
    """Returns a folder in the layout of DreamBooth's data set, with two subjects."""
    lists = {"Object": ["a {0} {1} on a table", "a red {0} {1}"], "Live Subject": ["a {0} {1} asleep", "a wet {0} {1}"]}
    text = "Classes\n\nsubject_name,class\nvase,tall vase\ncat2,cat\n\nPrompts\n\n"
    for kind, prompts in lists.items():
        rows = ",\n".join(f"{prompt!r}.format(unique_token, class_token)" for prompt in prompts)
        text += f"{kind} Prompts\n\nprompt_list = [\n{rows}\n]\n\n"
    for name in names:
        (folder / name).mkdir()
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(folder / name / "00.jpg")
    (folder / subjects.NAME).write_text(text)
    return str(folder)


def test_the_protocol_of_dreambooth_is_read(tmp_path):
    vase, cat = subjects.protocol(protocol(tmp_path))
    assert (vase.domain, cat.domain, cat.number) == ("tall vase", "cat", 1)
    assert vase.texts("sks vase", 25) == ["a sks vase on a table", "a red sks vase"]
    assert cat.texts(cat.plain, 1) == ["a cat asleep"]
    assert vase.source(1).name == "00.jpg" and vase.source(5) == vase.folder
    with pytest.raises(ValueError, match=r"protocol='.*': expected a folder with prompts_and_classes.txt"):
        subjects.protocol(str(tmp_path / "vase"))


def test_a_subject_without_pictures_is_told(tmp_path):
    with pytest.raises(ValueError, match="expected a folder cat2"):
        subjects.protocol(protocol(tmp_path, names=("vase",)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Returns the folder of a model without an image encoder and without E4T, as a checkpoint of SD 1.x."""
    sd = pipeline.load("random:tiny")
    networks = sd.networks.copy({"image_encoder": None})
    return pipeline.save(
        sd.with_parts(image_encoder=None).replace(networks=networks), tmp_path_factory.mktemp("m") / "sd"
    )


def made(sd, word, subject, options):
    """Returns noise in the place of a model's pictures."""
    count = options.seeds * len(subject.texts(word, options.prompts))
    return np.random.default_rng(count).integers(0, 256, (count, 16, 16, 3), np.uint8)


def test_any_checkpoint_is_compared_and_a_way_that_cannot_run_is_left_out(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "pictures", made)
    (tmp_path / "set").mkdir()
    given = ["--model", str(plain), "--protocol", protocol(tmp_path / "set"), "--only", "E4T, 1"]
    judge = ["--judge", str(clip_folder(tmp_path / "clip")), "--out", str(tmp_path / "out")]
    assert compare.compare(compare.read([*given, *judge])) == 0
    table = json.loads((tmp_path / "out" / "own" / "table.json").read_text())["table"]
    assert list(table) == [compare.BASE] and {"CLIP-I", "CLIP-T"} < set(table[compare.BASE])
    text = (tmp_path / "out" / "own" / "table.md").read_text()
    assert text in capsys.readouterr().out and "E4T, 1: left out: init='': expected a folder" in text
    assert (tmp_path / "out" / "own" / "grid-1.png").is_file()


def test_the_table_is_written_after_each_way(plain, tmp_path, monkeypatch):
    def tuned(options, people, base, label, name, more):
        if name == "LoRA, 5":
            raise KeyboardInterrupt
        if name == "DreamBooth, 1":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        assert more == (("steps=1", "seed=3") if name else ())
        for subject in people:
            yield subject, label, made(None, "", subject, options), {"steps": 1}

    monkeypatch.setattr(compare, "tuned", tuned)
    (tmp_path / "set").mkdir()
    chosen = ["DreamBooth, 1", "DreamBooth, 5", "LoRA, 5", "E4T, 1"]
    given = ["--model", str(plain), "--protocol", protocol(tmp_path / "set"), "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        compare.compare(compare.read([*given, "--with", "steps=1 seed=3", "--only", *chosen]))
    assert list(json.loads((tmp_path / "own" / "table.json").read_text())["table"]) == [compare.BASE, "DreamBooth, 5"]
    assert "DreamBooth, 1: left out: out of memory" in (tmp_path / "own" / "table.md").read_text()


def test_pictures_of_the_figure_are_small():
    assert compare.small(np.zeros((2, 512, 768, 3), np.uint8)).shape == (2, 171, 256, 3)
    assert compare.small(np.zeros((2, 64, 64, 3), np.uint8)).shape == (2, 64, 64, 3)


def test_e4t_takes_the_encoder_that_is_given():
    way = ways.of("model", "cat")["E4T, 1"]
    told = way.settings("model", "photo.png", init="encoder", vision="clip")
    assert (told.model, told.init, told.vision) == ("model", "encoder", "clip")
    other = ways.of("model", "cat")["LoRA, 5"].settings("model", "photo.png", init="encoder", vision="clip")
    assert (other.init, other.vision) == ("", "")
