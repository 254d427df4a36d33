"""Class rows of batches, class prompts, class pictures drawn before training, and runs with them that are killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from programs import load

import sdjax.settings
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.formats import pipeline
from sdjax.methods.full import Full
from sdjax.methods.vae import Vae
from sdjax.service import class_images, train_program
from sdjax.text.rare import rare
from sdjax.text.tokenizer import Tokenizer
from sdjax.training import checks, run_folder
from sdjax.training.begin import begin, task_of
from sdjax.training.loop import train
from sdjax.training.settings import Train
from sdjax.training.step import default_loss

ROOT = Path(__file__).parents[1]
CLASSES = ClassData(identifiers=("sks",))


def write(folder, grey, count, text=""):
    """Writes pictures of one grey each, grey + i, with captions where there is a text."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (grey + i,) * 3).save(folder / f"{i}.png")
        if text:
            (folder / f"{i}.txt").write_text(text)
    return str(folder)


@pytest.fixture
def run(tmp_path):
    """A run's settings: three pictures of a subject, five of its class."""
    subject, others = write(tmp_path / "dog", 10, 3, "in a park"), write(tmp_path / "dogs", 200, 5)
    data = Data(path=subject, word="sks dog", templates="trigger", batch=4, size=32)
    classes = dataclasses.replace(CLASSES, path=others, count=5, rows=1, weight=0.5)
    return Train(model="random:tiny", method=Full(("unet",), "attn2", keep=True), data=data, class_data=classes)


def build(run, **changes):
    data, classes = dataclasses.replace(run.data, **changes), run.class_data
    return batches.build(data, pipeline.load("random:tiny"), 0, classes=classes)


def greys(batch):
    return np.round((batch["pixels"][:, 0, 0, 0] + 1) * 127.5).astype(int)


def test_the_last_rows_of_every_batch_show_the_class(run):
    data, tokenizer = build(run, encode=False), pipeline.load("random:tiny").tokenizers["text_encoder"]
    stream = data.iterate(start=5)
    shown, others = [], []
    for step in range(5, 15):
        batch = next(stream)
        jax.tree.map(np.testing.assert_array_equal, data[step], batch)  # a function of the step
        shown += greys(batch)[:3].tolist()
        others += greys(batch)[3:].tolist()
        np.testing.assert_allclose(batch["weight"], [4 / 3, 4 / 3, 4 / 3, 0.5 * 4])
        assert batch["index"].tolist() == list(range(4 * step, 4 * step + 4))
        words = ["sks dog, in a park"] * 3 + ["a photo of dog"]
        np.testing.assert_array_equal(batch["ids"]["text_encoder"], tokenizer(words))
        words = ["dog, in a park"] * 3 + ["a photo of dog"]
        np.testing.assert_array_equal(batch["class_ids"]["text_encoder"], tokenizer(words))
    assert set(shown) == {10, 11, 12} and shown.count(10) == 10  # whole epochs of both
    assert set(others) == {200, 201, 202, 203, 204} and others.count(200) == 2


@pytest.mark.parametrize("cached", [False, True])
def test_rows_of_the_class_have_the_shape_of_the_subjects(run, tmp_path, cached):
    """Pictures of two shapes and square class pictures; each is shown about equally often."""
    for i in range(3):
        Image.new("RGB", (64, 40) if i else (40, 64), (10 + i,) * 3).save(tmp_path / "dog" / f"{i}.png")
    data = build(run, buckets=3, encode=False, cache=str(tmp_path / "cache") if cached else "")
    stream, shown, others = data.iterate(start=7), [], []
    for step in range(7, 67):
        batch = next(stream)
        if step < 12:
            jax.tree.map(np.testing.assert_array_equal, data[step], batch)  # a function of the step
        assert batch["pixels"].shape[:3] == (4, *data.plan.at(step)[0])
        shown += greys(batch)[:3].tolist()
        others += greys(batch)[3:].tolist()
    assert len(data.plan.shapes) == 2 and set(shown) == {10, 11, 12}
    assert all(abs(others.count(grey) - 12) <= 4 for grey in range(200, 205))
    few = dataclasses.replace(run.class_data, path=str(tmp_path / "dog" / "0.png"))
    with pytest.raises(ValueError, match="data.buckets=2: expected at most 1, the number of class pictures"):
        build(dataclasses.replace(run, class_data=few), buckets=3)


def test_rows_of_the_class_come_with_masks_and_caches(run, tmp_path):
    for place in (tmp_path / "dog").glob("*.png"):
        Image.new("L", (32, 32), 0).save(place.with_suffix(".mask.png"))
        half = Image.new("L", (32, 32), 0)
        half.paste(255, (0, 0, 16, 32))
        half.save(place.with_suffix(".mask.png"))
    masks = build(run, mask=True)[0]["mask"]
    assert masks[:3].mean() == 0.5 and masks[3].min() == 1
    kept = build(run, cache=str(tmp_path / "cache"))[0]
    assert kept["moments"].shape[0] == 4 and "pixels" not in kept


def test_a_lora_learns_from_both_kinds_of_rows(run):
    """By the documented command: the gradient is the subject's and lambda times the class's."""
    given = ["model=random:tiny", f"data.path={run.data.path}", "data.word=sks dog", "data.templates=trigger",
             "data.batch=2", "data.size=32", f"class_data.path={run.class_data.path}", "class_data.count=5",
             "class_data.weight=0.5", "class_data.identifiers=('sks',)", "method.targets=attn2"]  # fmt: skip
    settings = sdjax.settings.load(ROOT / "configs/lora.py", given)
    trained, frozen, data, _ = begin(settings)
    trained = jax.tree.map(lambda leaf: leaf + 0.01, trained)  # the second matrices start at zero
    loss = default_loss(settings.method, settings, task_of(settings, frozen))
    value = lambda tree, base, batch: loss(base, tree, batch, jax.random.key(0), jnp.int32(0))[0]  # noqa: E731
    gradient = jax.jit(jax.grad(value))
    batch = data[0]
    np.testing.assert_allclose(batch["weight"], [1 * 2, 0.5 * 2])
    whole, subject, others = (
        jax.flatten_util.ravel_pytree(gradient(trained, frozen, {**batch, "weight": np.float32(weight)}))[0]
        for weight in (batch["weight"], [2, 0], [0, 2])
    )
    assert np.abs(subject).max() > 0 and np.abs(others).max() > 0
    np.testing.assert_allclose(whole, subject + 0.5 * others, rtol=1e-3, atol=1e-4 * float(np.abs(whole).max()))


def test_one_picture_and_a_class_are_stacked(run, tmp_path):
    data = dataclasses.replace(run.data, path=str(tmp_path / "dog" / "0.png"))
    assert build(dataclasses.replace(run, data=data))[0]["moments"].shape[0] == 4  # few pictures are encoded beforehand


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a photo of sks dog", "a photo of dog"),
        ("sks, a man in a room", "a man in a room"),
        ("a man, sks, at night", "a man, at night"),
        ("risks and sks2", "risks and sks2"),
        ("sks", ""),
    ],
)
def test_a_class_prompt_is_the_subjects_without_identifiers(text, wanted):
    assert CLASSES.prompt(text) == wanted
    words = ClassData(identifiers=("<new>", "*s"))
    assert words.prompt(text.replace("sks", "<new>", 1)) == wanted or "risks" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere"}, "class_data.path='nowhere': python -m sdjax class_images RECIPE .* expected a folder"),
        ({"count": 6}, "class_data.count=6: .*class_images.* expected at most 5, as "),
        ({"rows": 4}, "class_data.rows=4: expected 1 to 3 of data.batch=4"),
        ({"identifiers": ("zwx",)}, "class_data.identifiers=.'zwx',.: no prompt contains one"),
    ],
)
def test_class_settings_that_do_not_fit(run, changes, message):
    settings = dataclasses.replace(run, preserve=1.0, class_data=dataclasses.replace(run.class_data, **changes))
    with pytest.raises(ValueError, match=message):
        checks.class_pictures(settings, checks.pictures(settings))


def test_class_pictures_are_counted_and_made_once(run, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import pickle\n\ndef config():\n    return pickle.loads(" + repr(__import__("pickle").dumps(run)) + ")\n"
    )
    folder, program = tmp_path / "drawn", load("train/class_images.py", monkeypatch)
    monkeypatch.setattr("sdjax.runtime.compile_cache.keep", lambda **_: None)
    write(folder, 50, 2, "a dog of mine")
    line = [str(recipe), f"class_data.path={folder}", "--set", "steps=1", "--set", "size=16", "--batch", "2"]

    def drawn():
        return {path.name: path.read_bytes() for path in sorted(folder.glob("class-*.png"))}

    assert class_images.main([*line, "class_data.count=5"]) == 0
    assert "3 class pictures made, 2 already existed" in capsys.readouterr().out
    first = drawn()
    assert len(first) == 3 and (folder / "class-00000.txt").read_text() == "dog, in a park"
    (folder / "class-00001.png").unlink()
    assert class_images.main([*line, "class_data.count=5"]) == 0
    assert "1 class pictures made, 4 already existed" in capsys.readouterr().out
    assert drawn() == first  # the same picture again
    more = ['class_data.prompts=("a red dog",)', "class_data.count=5"]
    assert class_images.main([*line, *more]) == 0
    assert "3 class pictures made" in capsys.readouterr().out and drawn().keys() == first.keys() and drawn() != first
    settings = dataclasses.replace(run, class_data=dataclasses.replace(run.class_data, path=str(folder)))
    assert len(checks.class_pictures(settings, checks.pictures(settings))) == 5
    assert class_images.main([*line, 'class_data.identifiers=("zwx",)']) == 1
    assert "error: class_data.identifiers=('zwx',): expected words that" in capsys.readouterr().err
    assert program.main is class_images.main


def test_a_run_draws_the_class_pictures_that_it_lacks(run, tmp_path, monkeypatch):
    draw, out = class_images.draw, tmp_path / "out"
    monkeypatch.setattr(class_images, "draw", lambda run: draw(run, {"steps": 1, "size": 16}))
    asked = dataclasses.replace(run, class_data=dataclasses.replace(run.class_data, path="", draw=True, count=3))
    with pytest.raises(ValueError, match="class_data.draw=True: expected class_data.path with it: only train/run.py"):
        checks.class_pictures(asked, checks.pictures(asked))
    settings = train_program.prepared(asked, out)
    pictures = sorted((out / "class").glob("class-*.png"))
    assert settings.class_data.path == str(out / "class") and len(pictures) == 3
    first = [path.read_bytes() for path in pictures]
    assert (out / "class" / "class-00000.txt").read_text() == "dog, in a park"
    pictures[1].unlink()
    assert train_program.prepared(asked, out) == settings  # goes on where it was
    assert [path.read_bytes() for path in pictures] == first
    assert build(settings, buckets=2)[0]["moments"].shape[0] == 4
    run_folder.write_settings(out, settings, "base")
    (out / "export").mkdir()
    run_folder.check_folder(out.rename(tmp_path / "moved"), train_program.prepared(asked, tmp_path / "moved"), "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Data(batch=1)}, "class_data.rows=1: expected data.batch=2 or more, not 1"),
        ({"method": Vae()}, "class_data.path='.*class': expected none: Vae has its own loss"),
    ],
)
def test_nothing_is_drawn_for_a_run_that_cannot_use_it(run, tmp_path, changes, message):
    asked = dataclasses.replace(run, class_data=dataclasses.replace(run.class_data, path="", draw=True), **changes)
    with pytest.raises(ValueError, match=message):
        train_program.prepared(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rare_words_are_single_tokens_that_came_late():
    tokenizer = pipeline.load("pocket").tokenizers["text_encoder"]
    found = rare(tokenizer, 12)
    assert len(found) == 12 and all(len(tokenizer.ids(word)) == 1 and len(word) <= 4 for word in found)
    made = Tokenizer.train(["dog dog dog sks sks cat cat"] * 2, 530)
    assert rare(made, 1) == ["sks"]


def test_vocabulary_says_rare_words(monkeypatch, capsys):
    program = load("train/vocabulary.py", monkeypatch)
    assert program.main(["--rare", "pocket", "3"]) == 0 and len(capsys.readouterr().out.split()) == 3
    assert program.main(["--rare", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_a_killed_run_with_class_rows_ends_as_the_undisturbed_one(run, tmp_path):
    """A process that is killed with SIGKILL, and the run goes on: the export has the same bits."""
    changes = ["model=random:tiny", f"data.path={run.data.path}", "data.word=sks dog", "data.size=32",
               "data.batch=4", "data.crop=random", "data.dropout=0.2", "preview=0", "preserve=0",
               "class_data.count=5", "steps=12",
               f"class_data.path={run.class_data.path}", "method.pattern=attn2", "checkpoint=1"]  # fmt: skip
    recipe, killed = "configs/dreambooth.py", tmp_path / "killed"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def export(out):
        train(sdjax.settings.load(ROOT / recipe, changes), out)
        return (out / "export" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    line = [sys.executable, "train/run.py", recipe, *changes, f"out={killed}"]
    with (
        open(tmp_path / "said.txt", "w") as said,
        subprocess.Popen(line, cwd=ROOT, env=env, stdout=said, stderr=said) as process,
    ):
        end = time.monotonic() + 300
        while not any((killed / "checkpoints").glob("[2-9]")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()[-2000:]
    assert export(killed) == export(tmp_path / "whole")
    events = [json.loads(text) for text in (killed / "metrics.jsonl").read_text().splitlines()]
    begun = [event["step"] for event in events if event.get("event") in ("started", "resumed")]
    assert len(begun) == 2 and 0 < begun[1] < 12
