"""A judge within a run: its figures in metrics.jsonl, and what `best` and `patience` make of them."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from test_likeness import clip_folder

from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.formats import judge
from sdjax.images import reading
from sdjax.methods import likeness
from sdjax.methods.chain import Chain
from sdjax.methods.lora import Lora
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.methods.vae import Vae
from sdjax.sampling import generate
from sdjax.training import export, judged
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the settings of a run on two pictures, with a judge."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "photos" / f"{i}.png")
    return Train(
        model="random:tiny",
        method=TextualInversion("<new>", "cat"),
        optim=Optim(lr=1e-2),
        data=Data(path=str(folder / "photos"), templates="object", batch=1, size=32),
        judge=str(clip_folder(folder)),
        prompts=("a photo of [name]", "[name] on the beach"),
        steps=2,
        preview=1,
        checkpoint=0,
        log=1,
    )


def lines(folder, name):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in found if name in line}


def test_previews_are_measured(run, tmp_path, monkeypatch):
    made = []
    real = generate.text2img
    monkeypatch.setattr(generate, "text2img", lambda *given, **how: made.append(real(*given, **how)) or made[-1])
    train(run, tmp_path)
    assert list(lines(tmp_path, "clip-i")) == [1, 2] and (tmp_path / "samples" / "0000002.png").is_file()
    clip = judge.load(run.judge)
    photos = [reading.picture(path) for path in sorted((tmp_path / run.data.path).glob("*.png"))]
    texts = [text for text in ("a photo of cat", "cat on the beach") for _ in range(4)]
    found = likeness.figures(clip, np.concatenate(made[-2:]), likeness.images(clip, photos), texts)
    assert lines(tmp_path, "clip-i")[2] == pytest.approx(found["clip-i"], abs=1e-5)
    assert lines(tmp_path, "clip-t")[2] == pytest.approx(found["clip-t"], abs=1e-5)


def test_the_best_previews_are_exported_and_patience_ends_a_run(run, tmp_path, monkeypatch):
    figures = {1: (0.2, 0.3), 2: (0.6, 0.2), 3: (0.7, 0.05), 4: (0.1, 0.1), 5: (0.9, 0.9)}
    kept = {}

    def show(session, step, weights):
        kept[step] = np.asarray(weights["rows"]["text_encoder"])
        return dict(zip(("clip-i", "clip-t"), figures[step], strict=True))

    monkeypatch.setattr("sdjax.training.session.Session._drawn", show)
    settings = dataclasses.replace(run, best="clip", patience=2, steps=5, keep=1)
    joined = train(settings, tmp_path)
    assert list(lines(tmp_path, "clip-i")) == [1, 2, 3, 4]  # two sums after the second are not larger
    np.testing.assert_array_equal(joined.rows("<new>")["text_encoder"], kept[2])
    assert export.write(tmp_path, tmp_path / "again")[1] == 2
    assert judged.best_of(tmp_path, "clip-i")[0] == 3 and judged.best_of(tmp_path, "clip-t")[0] == 1
    train(settings, tmp_path)  # it is over: nothing more is trained
    assert list(lines(tmp_path, "clip-i")) == [1, 2, 3, 4]


def test_words_that_only_the_run_knows_are_left_out_for_the_judge(run):
    assert judged.plain("a photo of <new>", run) == "a photo of cat"
    assert judged.plain("a photo of <new> cat", run) == "a photo of cat"
    named = dataclasses.replace(run, method=Lora(), class_data=ClassData(identifiers=("sks",)))
    assert judged.plain("a photo of sks dog, at night", named) == "a photo of dog, at night"
    both = dataclasses.replace(run, method=Chain((TextualInversion("<new>"), Lora())))
    assert judged.plain("<new> dog", both) == "dog"


def test_settings_that_do_not_fit_are_told(run, tmp_path):
    with pytest.raises(ValueError, match="best='clip': expected judge with it"):
        dataclasses.replace(run, judge="", best="clip")
    with pytest.raises(ValueError, match="best='clips': expected one of"):
        dataclasses.replace(run, best="clips")
    with pytest.raises(ValueError, match="preview=0: expected 1 or more with a judge"):
        dataclasses.replace(run, preview=0)
    with pytest.raises(ValueError, match="judge=.*expected '': the previews"):
        train(dataclasses.replace(run, method=Vae()), tmp_path / "vae")
    with pytest.raises(ValueError, match="best='clip': expected clip-i"):
        train(dataclasses.replace(run, judge="random:tiny", best="clip"), tmp_path / "alone")
    assert dataclasses.replace(run, preview=None, prompts=()).previews == 50
