"""LPIPS as the autoencoder's perceptual distance: its files in every published layout, training with it, refusals."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
from torch_weights import shapes

from sdjax import trees
from sdjax.formats import pipeline
from sdjax.formats.models import lpips
from sdjax.methods.vae import Vae
from sdjax.models.critics import Lpips
from sdjax.training.step import initial_state, make_step

WIDTHS = (4, 6, 8, 8, 8)
METHOD = Vae(recon="l2", perceptual=1.0)


@functools.cache
def state():
    """Returns {file name: array}, noise in the shapes of a narrow VGG16 and its linear layers."""
    x = jnp.zeros((1, 16, 16, 3))
    random = np.random.default_rng(0)
    found = shapes(jax.eval_shape(lambda: Lpips(WIDTHS).init(jax.random.key(0), x, x))["params"])
    return {
        name: np.abs(random.normal(size=shape) * (0.3 if len(shape) == 4 else 0.1)).astype(np.float32)
        if name.startswith("lin")
        else (random.normal(size=shape) * (2 / max(np.prod(shape[1:]), 8)) ** 0.5).astype(np.float32)
        for name, shape in found.items()
    }


def tops():
    return {name: value for name, value in state().items() if name.startswith("lin")}


def body():
    return {name: value for name, value in state().items() if not name.startswith("lin")}


def whole():
    """Returns the state of lpips.LPIPS(net="vgg"): slices, a scaling layer, and the linear layers twice."""
    ends = (4, 9, 16, 23, 30)  # of torchvision's features, by slice
    found = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    for name, value in body().items():
        slice_ = next(i for i, end in enumerate(ends) if int(name.split(".")[1]) < end)
        found[f"net.slice{slice_ + 1}.{name.removeprefix('features.')}"] = value
    return found | tops() | {name.replace("lin", "lins."): v for name, v in tops().items()}


def pth(path, values):
    torch.save({name: torch.tensor(value) for name, value in values.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "both.safetensors"
    safetensors.numpy.save_file(state(), str(path))
    return str(path)


def test_every_layout_gives_the_same_weights(file, tmp_path):
    wanted = lpips.read(file)
    classifier = {"classifier.0.weight": np.zeros((3, 2), np.float32)}
    vgg, vgg_tops = pth(tmp_path / "vgg16.pth", body() | classifier), pth(tmp_path / "vgg.pth", tops())
    for source in (f"{vgg},{vgg_tops}", f"{vgg_tops},{vgg}", pth(tmp_path / "whole.pth", whole())):
        assert trees.digest(lpips.read(source)) == trees.digest(wanted)
    kernel = wanted["features.2"]["kernel"]
    np.testing.assert_array_equal(kernel, state()["features.2.weight"].transpose(2, 3, 1, 0))
    assert {x.dtype.name for x in jax.tree.leaves(lpips.read(file, "bfloat16"))} == {"bfloat16"}


def test_files_that_do_not_fit(file, tmp_path):
    vgg, vgg_tops = pth(tmp_path / "vgg16.pth", body()), pth(tmp_path / "vgg.pth", tops())
    short = pth(tmp_path / "short.pth", {name: v for name, v in state().items() if name != "features.28.bias"})
    wrong = pth(tmp_path / "wrong.pth", {**state(), "features.0.weight": np.zeros((4, 3, 11, 11), np.float32)})
    for source, message in (
        (vgg, r"vgg16.pth: no LPIPS with VGG16: missing lin0.model.1.weight, .*lin4"),
        (vgg_tops, r"vgg.pth: does not fit VGG16 and its linear layers: missing features.0.bias.*\(26\)"),
        (short, r"missing features.28.bias"),
        (wrong, r"misshapen features.0.weight \[4, 3, 11, 11\] instead of \[4, 3, 3, 3\]"),
        (f"{file},{vgg}", "holds features.0.bias twice"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.load("random:tiny", perceptual=source)


def test_an_attack_in_a_file_is_an_error(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"lin0.model.1.weight": Attack()}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match="vgg.pth: cannot be read"):
        pipeline.load("random:tiny", perceptual=str(tmp_path / "vgg.pth"))


@pytest.mark.parametrize("network", ["lpips", "image encoder"])
def test_training_with_a_perceptual_distance(network, file):
    sd = pipeline.load("random:tiny", perceptual=file if network == "lpips" else None)
    assert (sd.reference.lpips is not None) == (network == "lpips") and "image_encoder" in sd.parts
    trained, frozen = METHOD.split(sd.with_parts(image_encoder=None) if network == "lpips" else sd, jax.random.key(0))
    assert set(trained) == {"vae"}
    batch = {
        "pixels": np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32),
        "index": np.arange(2, dtype=np.int32),
    }
    before, tx = trees.digest(frozen), optax.adam(1e-3)
    step = jax.jit(make_step(METHOD, tx, jax.random.key(1)))
    start, errors = initial_state(trained, tx), []
    now = start
    for _ in range(6):
        now, metrics = step(now, frozen, batch)
        errors.append(float(metrics["error"]))
    plain = float(jax.jit(lambda t: Vae(recon="l2").loss(frozen, t, batch, jax.random.key(1), 0)[0])(trained))
    assert errors[0] > plain and errors[-1] < errors[0] and np.isfinite(errors).all()
    assert trees.digest(frozen) == before


def test_the_loss_holds_lpips_times_its_weight(file):
    sd = pipeline.load("random:tiny", perceptual=file)
    random = np.random.default_rng(0)
    x, y = (jnp.asarray(random.uniform(-1, 1, (2, 32, 32, 3)), jnp.float32) for _ in range(2))
    distance = Lpips(WIDTHS).apply({"params": sd.reference.lpips}, x, y)
    wanted = jnp.mean((x - y) ** 2) + 0.5 * distance.mean()
    assert float(distance.min()) > 0
    np.testing.assert_allclose(Vae(recon="l2", perceptual=0.5)._distance(sd, x, y), wanted, rtol=1e-5)


def test_a_model_without_either_network_is_refused():
    sd = pipeline.load("random:tiny").with_parts(image_encoder=None)
    with pytest.raises(
        ValueError, match=r"perceptual=1.0: expected 0, since the model has neither LPIPS nor an image_encoder"
    ):
        METHOD.split(sd, jax.random.key(0))
