"""Sums of models and of adapters into models, against the formulas in numpy and against attached adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from adapter_files import made
from test_lora import ATTENTION, kohya

import sdjax
from sdjax import convert, tasks, trees
from sdjax.formats import merging, pipeline
from sdjax.formats.storage import headers
from sdjax.settings import SettingError


def another(seed):
    """Returns random:tiny with other weights."""
    sd = pipeline.load("random:tiny")
    random = np.random.default_rng(seed)
    change = lambda x: x + 0.1 * jnp.asarray(random.standard_normal(x.shape), x.dtype)  # noqa: E731
    return sd.with_parts(**{name: jax.tree.map(change, part) for name, part in sd.parts.items()})


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three models and their single files."""
    folder, models = tmp_path_factory.mktemp("models"), [another(seed) for seed in range(3)]
    named = dict(zip("abc", models, strict=True))
    return models, [pipeline.save(sd, folder / f"{name}.safetensors", "single-file") for name, sd in named.items()]


@pytest.mark.parametrize("minus", [False, True])
def test_models_are_summed_as_a1111_sums_them(minus, three, tmp_path):
    """Of every tensor in the files, bit for bit."""
    _, paths = three
    out = tmp_path / "out.safetensors"
    more = ["--minus", str(paths[2])] if minus else []
    assert convert.main([str(paths[0]), str(out), "--merge", f"{paths[1]}:0.3", *more]) == 0
    a, b, c, ours = (safetensors.numpy.load_file(path) for path in (*paths, out))
    w = np.float32(0.3)
    assert ours.keys() == a.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(ours[name], x + (b[name] - c[name]) * w if minus else x * (1 - w) + b[name] * w)
    said = headers.metadata(out)["modelspec.merged_from"]
    assert said == ("a, b:0.3, minus c" if minus else "a, b:0.3")


def test_an_inpainting_model_takes_a_difference_and_keeps_its_channels(three):
    a, b, c = three[0]
    painting = tasks.of(a, "inpainting").prepare(a, jax.random.key(0))
    wide = painting.parts["unet"]["conv_in"]["kernel"] + 1
    unet = {**painting.parts["unet"], "conv_in": {**painting.parts["unet"]["conv_in"], "kernel": wide}}
    sd = merging.merged(painting.with_parts(unet=unet), b, 1.0, c)
    kernels = [np.asarray(one.parts["unet"]["conv_in"]["kernel"]) for one in (sd, b, c)]
    np.testing.assert_array_equal(kernels[0][:, :, :4], np.asarray(wide)[:, :, :4] + (kernels[1] - kernels[2]))
    np.testing.assert_array_equal(kernels[0][:, :, 4:], np.asarray(wide)[:, :, 4:])
    with pytest.raises(ValueError, match="models of other shapes .* in unet differ conv_in.kernel"):
        merging.merged(a, painting, 0.5)


def test_what_cannot_be_summed_is_said(three, tmp_path, capsys):
    (a, b, _), paths = three
    with pytest.raises(SettingError, match="weight=inf: expected a number"):
        merging.merged(a, b, float("inf"))
    with pytest.raises(ValueError, match="models of other shapes cannot be merged; in unet differ"):
        merging.merged(a, pipeline.load("pocket"), 0.5)
    assert convert.main([str(paths[0]), str(tmp_path / "x"), "--minus", str(paths[1])]) == 1
    assert "expected --merge MODEL with it" in capsys.readouterr().err
    assert convert._weighed("random:tiny") == ("random:tiny", 0.5)
    assert convert._weighed("random:tiny:0.25") == ("random:tiny", 0.25)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_adapters_are_summed_into_the_weights(dtype, tmp_path, capsys):
    """As attached, rounded once; a word becomes a part of the model."""
    pipe, base = made("sd1")
    ink, words = tmp_path / "ink.safetensors", tmp_path / "toy.safetensors"
    tensors = kohya(pipe, ATTENTION, rank=2)
    safetensors.torch.save_file(tensors, ink, {"modelspec.trigger_phrase": "ink style"})
    safetensors.torch.save_file({"<toy>": torch.ones(1, 32)}, words)
    source = pipeline.save(base, tmp_path / "model", dtype=dtype)
    assert convert.main([str(source), str(tmp_path / "out"), "--adapter", f"{ink}:0.5", str(words)]) == 0
    ours, stored = sdjax.load(tmp_path / "out", None), sdjax.load(source, None)
    wanted = sdjax.attach(sdjax.load(source), ink, 0.5)
    for part in ("unet", "vae"):
        expected = jax.tree.map(lambda x, old: x.astype(old.dtype), wanted.parts[part], stored.parts[part])
        jax.tree.map(np.testing.assert_array_equal, ours.parts[part], expected)
    assert trees.digest(ours.parts["unet"]) != trees.digest(stored.parts["unet"]) and ours.knows("<toy>")
    assert headers.described(tmp_path / "out")["modelspec.merged_from"] == "model, ink:0.5, toy:1"
    assert headers.described(tmp_path / "out")["modelspec.trigger_phrase"] == "ink style"
    assert "summed model, ink:0.5, toy:1" in capsys.readouterr().out
    assert convert.main([str(source), str(tmp_path / "no"), "--adapter", "none.safetensors"]) == 1
    assert "none.safetensors: no such file" in capsys.readouterr().err
