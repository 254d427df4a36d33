"""The main job from end to end: one picture in, pictures of its subject out; tiny models and the embedded one."""

import json

import numpy as np
import pytest
from PIL import Image
from programs import ROOT, photo

import sdjax
from sdjax import settings
from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.formats.adapters import e4t
from sdjax.methods.e4t import E4T
from sdjax.runtime import compile_cache
from sdjax.service import demo
from sdjax.training import run_folder
from sdjax.training.loop import train
from sdjax.training.run_folder import fresh


@pytest.fixture
def folder(tmp_path, key):
    """A tiny model with an e4t/ part."""
    trained, frozen = E4T().split(pipeline.load("random:tiny"), key)
    return run_folder.export(E4T(), frozen, trained, tmp_path / "model")[0]


def test_demo_leaves_pictures_times_and_a_model_for_pytorch(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr(compile_cache, "keep", lambda **_: None)
    arguments = ["--model", str(folder), "--image", photo(tmp_path / "my photo.png"), "--steps", "1", "--out", str(out)]
    assert demo.main(arguments) == 0, capsys.readouterr().err
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 9 * 32
    assert len(list(out.glob("*.json"))) == len(demo.PROMPTS) + 1
    assert "tuning, compilation included" in json.loads((out / "timings.json").read_text())
    said = capsys.readouterr().out
    assert f"python -m sdjax.convert {out / 'run' / 'export'} DST" in said
    (out / "run" / "config.json").write_text("{}")
    assert demo.main(arguments) == 1
    assert (out / "run" / "export").is_dir()
    assert "holds other files than a run's; choose another out=DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_another_subject_does_not_replace_the_first(folder, tmp_path, monkeypatch):
    concept = tmp_path / "out" / "export" / "e4t" / "concept.png"

    def tune(path, *more):
        wanted = [f"model={folder}", f"init={folder}", f"data.path={path}", "steps=1", "data.batch=2", *more]
        train(settings.load(ROOT / "configs" / "e4t_tune.py", wanted), tmp_path / "out")

    tune(photo(tmp_path / "0.png", 0))
    before = concept.read_bytes()
    with pytest.raises(
        ValueError, match="its run had data.path='.*0.png', this one has '.*1.png'; choose another out="
    ):
        tune(photo(tmp_path / "1.png", 1))
    monkeypatch.chdir(tmp_path)
    tune("0.png", "optim.lr=1e-5")  # the same one under another name
    photo(tmp_path / "0.png", 1)  # another one under the same name
    with pytest.raises(ValueError, match="its run started from another model or picture; choose another out=DIR"):
        tune("0.png")
    assert concept.read_bytes() == before


def test_only_runs_are_removed(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert fresh(tmp_path / "run").is_dir() and fresh(tmp_path / "none") == tmp_path / "none"
    (tmp_path / "run" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="run': holds other files than a run's"):
        fresh(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"class": "Train"}))
    (tmp_path / "run" / "checkpoints" / "100").mkdir()
    with pytest.raises(ValueError, match="holds a run with checkpoints"):
        fresh(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "100").rmdir()
    assert not fresh(tmp_path / "run").exists()


def test_settings_that_an_e4t_folder_lacks_are_named(folder):
    path = folder / "e4t" / "config.json"
    path.write_text(json.dumps({"domain": "face"}))
    with pytest.raises(
        ValueError, match="e4t/config.json: has no word, scale, .*reference; expected the settings of E4T"
    ):
        e4t.personalise(pipeline.load(folder), folder, np.zeros((32, 32, 3), np.uint8))


def test_the_embedded_encoder_sees_whom_it_looks_at():
    """Its pictures of two people of unlike hair have the hair of each, with no training at all."""
    sd, folder = pipeline.load("pocket"), pipeline.locate("pocket")
    place = pocketland.scene(1, context="room", style="photo", accessory="none")
    people = [pocketland.identity(i) for i in range(pocketland.VALIDATION[0], pocketland.VALIDATION[0] + 200)]
    people = [
        next(who for who in people if who.hair_color == color and who.hair_style == "long") for color in ("red", "blue")
    ]
    drawn = [pocketland.draw(who, place) for who in people]
    made = [
        sdjax.text2img(e4t.personalise(sd, folder, picture), ["a photo of *s in a room"], seeds=[0], steps=6)[0]
        for picture in drawn
    ]
    red, blue = (picture.reshape(-1, 3).mean(0) for picture in made)
    assert red[0] - red[2] > blue[0] - blue[2] + 5, (red, blue)
