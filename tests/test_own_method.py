"""A method in a user's recipe file: trains, resumes, previews, exports, converts with --recipe, starts again."""

import json

import jax
import numpy as np
import pytest
import safetensors
from PIL import Image

import sdjax.settings
from sdjax import trees
from sdjax.convert import main
from sdjax.formats import pipeline
from sdjax.runtime import compile_cache
from sdjax.training import run_folder
from sdjax.training.begin import begin
from sdjax.training.loop import train

RECIPE = '''"""Trains the first biases.  python train/run.py mine.py"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sdjax import trees
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.methods.method import Method
from sdjax.training.settings import Train


@dataclass(frozen=True)
class Mine(Method):
    """Biases, and a scale of its own."""

    pattern: str = "^conv_in.bias$"

    def split(self, sd, key=None):
        chosen, rest = trees.partition(sd.parts["unet"], self.pattern)
        scale = jax.ShapeDtypeStruct((1,), jnp.float32) if key is None else 1 + jax.random.normal(key, (1,))
        return {"unet": trees.copy(chosen, jnp.float32), "scale": scale}, sd.with_parts(unet=rest)

    def join(self, frozen, trained, key=None):
        return frozen.with_parts(unet=trees.merge(frozen.parts["unet"], trained["unet"]))

    def loss(self, frozen, trained, batch, key, step, axis=None):
        return sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(trained)), {}


def config():
    data = Data(path="pocketland", size=32, batch=2, source=Pocketland(count=8), word="face")
    prompts = ("a photo of a [name]",)
    return Train("random:tiny", method=Mine(), data=data, steps=2, checkpoint=1, preview=2, prompts=prompts)
'''


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The program keeps no compiled programs in the user's folder."""
    monkeypatch.setattr(compile_cache, "keep", lambda **_: None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("mine") / "run"
    train(sdjax.settings.load(recipe), out)
    return out


def leaves(path):
    with safetensors.safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def test_it_previews_and_exports(run):
    with Image.open(run / "samples" / "0000002.png") as sheet:
        assert sheet.width > 4 * 32 and sheet.height > 32  # four seeds, with their labels
    found, about = leaves(run / "export" / "trained.safetensors")
    assert set(found) == {"scale", "unet.conv_in.bias"} and about["method"] == "Mine"
    assert json.loads(about["settings"]) == {"pattern": "^conv_in.bias$"}
    assert found["scale"].shape == (1,) and np.abs(found["scale"] - 1).max() > 0


def test_it_resumes_to_the_same_bits(run, recipe, tmp_path):
    train(sdjax.settings.load(recipe, ["steps=1", "preview=0"]), tmp_path / "run")
    train(sdjax.settings.load(recipe, ["preview=0"]), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"step": 1, "event": "resumed"} in lines
    mine, whole = (leaves(folder / "export" / "trained.safetensors")[0] for folder in (tmp_path / "run", run))
    for name in whole:
        np.testing.assert_array_equal(mine[name], whole[name])


def test_it_is_converted_by_the_recipe_that_the_user_names(run, recipe, tmp_path, capsys):
    assert main([str(run), str(tmp_path / "out"), "--recipe", str(recipe)]) == 0, capsys.readouterr().err
    there, here = (folder / "trained.safetensors" for folder in (tmp_path / "out", run / "export"))
    assert there.read_bytes() == here.read_bytes()
    assert main([str(run), str(tmp_path / "no")]) == 1
    said = capsys.readouterr().err
    assert "method.class='Mine': accepted are " in said and "Chain, " in said
    assert main(["random:tiny", str(tmp_path / "no"), "--recipe", str(recipe)]) == 1
    assert "recipe: for a run's folder; this is none" in capsys.readouterr().err


def test_it_starts_again_from_its_file(run, recipe, tmp_path):
    path = run / "export" / "trained.safetensors"
    trained, frozen, *_ = begin(sdjax.settings.load(recipe, [f"init={path}"]), pictures=False)
    found, _ = leaves(path)
    np.testing.assert_array_equal(trained["scale"], found["scale"])
    np.testing.assert_array_equal(trained["unet"]["conv_in"]["bias"], found["unet.conv_in.bias"])
    with pytest.raises(
        ValueError, match="init='.*trained.safetensors': its weights are not this method's: unet.conv_in"
    ):
        begin(sdjax.settings.load(recipe, [f"init={path}", "method.pattern=^conv_out.bias$"]), pictures=False)
    with pytest.raises(ValueError, match="init='.*': expected of the kind embedding: TextualInversion does not start"):
        settings = sdjax.settings.load(run_folder.Path("configs/textual_inversion.py"), ["model=random:tiny"])
        begin(sdjax.settings.override(settings, [f"init={path}", f"data.path={run / 'samples'}"]), pictures=False)


def test_split_without_a_key_draws_nothing_and_a_file_fills_it(recipe):
    method, sd = sdjax.settings.load(recipe).method, pipeline.load("random:tiny")
    shapes, _ = method.split(sd)
    whole, _ = method.split(sd, jax.random.key(0))
    assert isinstance(shapes["scale"], jax.ShapeDtypeStruct)
    drawn = run_folder.drawn(shapes, method, sd, jax.random.key(0))
    assert trees.digest(drawn) == trees.digest(whole)


def test_a_class_that_is_no_method_is_refused():
    settings = sdjax.settings.load("configs/full.py", ["data.path=pocketland"])
    with pytest.raises(ValueError, match="method='int': expected a class that names sdjax.methods.method.Method"):
        begin(sdjax.settings.dataclasses.replace(settings, method=3))
