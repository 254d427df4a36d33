"""The base model of a run: another autoencoder, prediction type, averaged weights and tokenizer, as for pictures."""

import dataclasses

import jax
import numpy as np
import pytest
from programs import photo

import sdjax
from sdjax import trees
from sdjax.data.batches import Data
from sdjax.formats import pipeline
from sdjax.formats.storage import files
from sdjax.methods.full import Full
from sdjax.service import batch, class_images
from sdjax.settings import SettingError
from sdjax.training import base
from sdjax.training.begin import begin
from sdjax.training.settings import Train
from sdjax.training.unrounded import unrounded


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Returns (a single file, a folder with another autoencoder, a picture)."""
    folder = tmp_path_factory.mktemp("base")
    sd = pipeline.load("random:tiny")
    sdjax.save(sd, folder / "one.safetensors", format="single-file")
    other = sd.with_parts(vae=jax.tree.map(lambda x: x * 1.5, sd.parts["vae"]))
    sdjax.save(other, folder / "other")
    photo(folder / "a.png")
    return folder / "one.safetensors", folder / "other", folder / "a.png"


def run(places, **more):
    data = Data(path=str(places[2]), size=32, batch=1, word="a cat", templates="object")
    return Train(model=str(places[0]), method=Full(("unet",), "attn2"), data=data, **more)


def test_a_run_trains_with_another_autoencoder(places):
    told = run(places, vae=str(places[1]), frozen="bfloat16")
    trained, frozen, data, mark = begin(told)
    wanted = pipeline.load(places[1]).parts["vae"]
    assert trees.digest(unrounded(frozen, told).parts["vae"]) == trees.digest(wanted)
    plain = run(places)
    before, _, others, old = begin(plain)
    assert mark != old and trees.digest(before) == trees.digest(trained)
    assert np.abs(data[0]["moments"] - others[0]["moments"]).max() > 1e-3
    sd = pipeline.load(places[0])
    assert base.digest(plain, sd) == trees.digest(sd)  # as in runs from before these settings


def test_the_prediction_type_and_the_tokenizer_enter_the_digest(places):
    marks = [base.digest(told, base.load(told)) for told in (run(places), run(places, prediction_type="v_prediction"))]
    assert marks[0] != marks[1]
    assert base.load(run(places, prediction_type="v_prediction")).schedule.prediction_type == "v_prediction"
    told = run(places, tokenizer=str(places[1] / "tokenizer"))
    assert base.digest(told, base.load(told)) not in marks
    new = [Train(model="new:tiny", vae=vae) for vae in ("", "other")]
    assert len({base.digest(one, pipeline.load(places[1])) for one in new}) == 2


def test_averaged_weights_of_a_single_file(places, tmp_path):
    from sdjax.formats.storage.tensor_file import TensorFile

    there, prefix = TensorFile(places[0]), "model.diffusion_model."
    held = {name: there.read(name) for name in there.names}
    held |= {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": 2 * x
        for name, x in held.items()
        if name.startswith(prefix)
    }
    path = tmp_path / "both.safetensors"
    lazy = {name: files.Tensor(x.shape, x.dtype.name, lambda x=x: x) for name, x in held.items()}
    files.write_safetensors(path, lazy, there.metadata)
    told = dataclasses.replace(run(places, model_ema=True), model=str(path))
    raw = base.load(dataclasses.replace(told, model_ema=False)).parts["unet"]
    for x, y in zip(jax.tree.leaves(base.load(told).parts["unet"]), jax.tree.leaves(raw), strict=True):
        np.testing.assert_array_equal(x, 2 * y)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_ema": True}, "model_ema=True: .*holds no averaged ones"),
        ({"model": "pocket", "model_ema": True}, "model_ema=True: pocket is not one; expected a single file"),
        ({"model": "pocket", "tokenizer": "x"}, "tokenizer='x': pocket is not one; expected a single file"),
        ({"vae": "none-there"}, "vae='none-there': .* expected an autoencoder that fits the model"),
    ],
)
def test_what_does_not_fit_is_said(places, changes, said):
    with pytest.raises(SettingError, match=said):
        base.load(dataclasses.replace(run(places), **changes))


def test_a_prediction_type_is_one_of_two():
    with pytest.raises(SettingError, match="prediction_type='v': expected one of '', epsilon, v_prediction"):
        Train(prediction_type="v")


def test_class_pictures_come_from_the_same_model(places, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(batch, "run", lambda folder, jobs, usual, rows: seen.update(usual) or (1, 0, 0))
    told = run(places, vae=str(places[1]))
    told = dataclasses.replace(told, class_data=dataclasses.replace(told.class_data, path=str(tmp_path / "dogs"),
                                                                    prompts=("a dog",), count=1))  # fmt: skip
    class_images.draw(told)
    wanted = {"grammar": "plain", "clip_skip": 1, "model": str(places[0]), "vae": str(places[1]), "ema": False}
    assert seen == wanted
