"""Contrastive training that goes on from an export: text projection and temperature lie in the model's clip/ folder."""

import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sdjax import trees
from sdjax.formats import pipeline
from sdjax.methods.clip import Clip
from sdjax.methods.full import Full
from sdjax.models.reference import Reference
from sdjax.training import run_folder
from sdjax.training.begin import begin
from sdjax.training.settings import Train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns (trained, folder of its export) of an untrained run whose temperature was moved."""
    trained, frozen = Clip().split(pipeline.load("random:tiny"), jax.random.key(3))
    trained = {**trained, "logit_scale": jnp.float32(4.25)}
    return trained, run_folder.export(Clip(), frozen, trained, tmp_path_factory.mktemp("clip") / "export")[0]


def test_a_run_goes_on_from_its_export(run):
    trained, folder = run
    again, frozen = Clip().split(pipeline.load(folder), jax.random.key(4))
    assert trees.digest(again) == trees.digest(trained)
    assert frozen.reference.clip is None  # what trains is not frozen too
    half, _ = Clip().split(pipeline.load(folder, "bfloat16"), jax.random.key(4))
    np.testing.assert_array_equal(half["text_projection"], trained["text_projection"])
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"float32"} and float(half["logit_scale"]) == 4.25


def test_a_fresh_run_draws_its_projection():
    one, other = (Clip().split(pipeline.load("random:tiny"), jax.random.key(i))[0] for i in range(2))
    assert np.abs(one["text_projection"] - other["text_projection"]).max() > 0.01
    assert float(one["logit_scale"]) == pytest.approx(np.log(1 / 0.07))


def test_the_file_has_the_names_of_clip_model(run):
    trained, folder = run
    held = safetensors.numpy.load_file(str(folder / "clip" / "projection.safetensors"))
    assert set(held) == {"text_projection.weight", "logit_scale"} and held["logit_scale"].shape == ()
    np.testing.assert_array_equal(held["text_projection.weight"], trained["text_projection"].T)


def test_other_methods_and_conversions_carry_it(run, tmp_path):
    trained, folder = run
    method = Full(("unet",), "attn2")
    tuned, frozen = method.split(pipeline.load(folder), jax.random.key(0))
    other = run_folder.export(method, frozen, tuned, tmp_path / "tuned")[0]
    again, _ = Clip().split(pipeline.load(other), jax.random.key(4))
    assert trees.digest(again) == trees.digest(trained)
    pipeline.save(pipeline.load("random:tiny"), other)
    assert not (other / "clip").exists()  # a model without it takes the old one's away


def test_rounding_what_is_frozen_leaves_it(run):
    settings = Train(model=str(run[1]), method=Full(("unet",), "attn2"), frozen="bfloat16")
    frozen = begin(settings, pictures=False)[1]
    assert frozen.parts["vae"]["encoder"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    assert trees.digest(frozen.reference) == trees.digest(pipeline.load(run[1]).reference)


def test_diffusers_passes_over_it(run, recwarn):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(run[1])
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel"


def test_another_image_encoder_starts_afresh(run):
    _, folder = run
    sd = pipeline.load(folder, vision=str(folder))
    assert sd.reference == Reference()
    started, _ = Clip().split(sd, jax.random.key(4))
    assert float(started["logit_scale"]) == pytest.approx(np.log(1 / 0.07))


def test_a_projection_that_does_not_fit(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "copy")
    values = {"text_projection.weight": np.zeros((3, 2), np.float32), "logit_scale": np.zeros((), np.float32)}
    safetensors.numpy.save_file(values, str(tmp_path / "copy" / "clip" / "projection.safetensors"))
    with pytest.raises(ValueError, match="does not fit the encoders beside it: misshapen text_projection.weight"):
        pipeline.load(tmp_path / "copy")


def test_a_projection_trains_between_encoders_as_they_are():
    sd = pipeline.load("random:tiny")
    method = Clip(parts=("image_encoder",))
    trained, frozen = method.split(sd, jax.random.key(0))
    assert set(trained) == {"image_encoder", "text_projection", "logit_scale"}
    alone, frozen = Clip(parts=()).split(sd, jax.random.key(0))
    assert set(alone) == {"text_projection", "logit_scale"}
    assert trees.digest(frozen.parts) == trees.digest(sd.parts)
    joined = Clip(parts=()).join(frozen, alone)
    assert trees.digest(joined.parts) == trees.digest(sd.parts)
    np.testing.assert_array_equal(joined.reference.clip["text_projection"]["kernel"], alone["text_projection"])
    batch = {"pixels": jnp.zeros((2, 32, 32, 3)), "ids": sd.tokenize(["a face", "a cat"])}
    loss = lambda tree: Clip(parts=()).loss(frozen, tree, batch, jax.random.key(0), jnp.int32(0))[0]  # noqa: E731
    assert np.abs(jax.grad(loss)(alone)["text_projection"]).max() > 0
    with pytest.raises(ValueError, match="parts='vae': expected text_encoder or image_encoder"):
        Clip(parts=("vae",))
