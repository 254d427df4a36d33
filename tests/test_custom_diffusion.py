"""Custom Diffusion's files: what diffusers makes of ours, what we make of them, training that goes on from them."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import StableDiffusionPipeline
from torch_step import models
from torch_weights import to_torch

import sdjax
from sdjax import trees
from sdjax.__main__ import main
from sdjax.formats.adapters import kinds
from sdjax.formats.storage import headers
from sdjax.methods.chain import Chain
from sdjax.methods.custom_diffusion import CustomDiffusion
from sdjax.methods.lora import Lora
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training import run_folder

METHOD = Chain((TextualInversion("<new>", "red"), CustomDiffusion(query=True)))


@pytest.fixture(scope="module")
def learned():
    """(trained, frozen) of the method, with noise in all that trains."""
    trained, frozen = METHOD.split(models()[0], jax.random.key(1))
    random = np.random.default_rng(8)
    return jax.tree.map(lambda x: x + np.float32(0.1) * random.standard_normal(x.shape, np.float32), trained), frozen


@pytest.fixture(scope="module")
def folder(learned, tmp_path_factory):
    trained, frozen = learned
    folder = tmp_path_factory.mktemp("export")
    path, use = run_folder.export(METHOD, frozen, trained, folder)
    assert path == folder / "pytorch_custom_diffusion_weights.safetensors"
    assert sorted(file.name for file in folder.iterdir()) == ["learned_embeds.safetensors", path.name]
    assert "load_attn_procs" in use[1] and "load_textual_inversion" in use[2]
    return folder


def predicted(sd, z, t, context):
    return jax.jit(lambda sd: sd.call("unet", z, t, context)[0])(sd)


def test_diffusers_reads_what_we_write(learned, folder, tmp_path):
    """Weights and word: the text encoder's output and the UNet's prediction are those of our joined model."""
    trained, frozen = learned
    sd, random, t = METHOD.join(frozen, trained), np.random.default_rng(0), np.array([10, 700])
    z, text = random.normal(size=(2, 16, 16, 4)).astype(np.float32), ["a photo of <new> face", "<new> in the snow"]
    sdjax.save(models()[0], tmp_path / "sd")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", safety_checker=None)
    pipe.unet.load_attn_procs(folder, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe)
    pipe.load_textual_inversion(folder / "learned_embeds.safetensors")
    with torch.no_grad():
        told, _ = pipe.encode_prompt(text, "cpu", 1, False)
        theirs = pipe.unet(to_torch(z), torch.tensor(t), told).sample.permute(0, 2, 3, 1).numpy()
    context = sd.condition(sd.tokenize(text)).unet.context
    assert np.abs(context - told.numpy()).max() <= 1e-5 * float(told.abs().max())
    ours = predicted(sd, z, t, context)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.abs(predicted(frozen, z, t, context) - theirs).max() > 1e-3 * np.abs(theirs).max()


def test_we_read_what_we_write(learned, folder):
    trained, frozen = learned
    wanted, base = METHOD.join(frozen, trained), models()[0]
    sd = sdjax.attach(sdjax.attach(base, folder), folder / "learned_embeds.safetensors")
    one, other = trees.flatten(sd.parts["unet"]), trees.flatten(wanted.parts["unet"])
    assert all(np.allclose(one[name], other[name], atol=1e-7) for name in other)
    ((encoder, ids),) = sd.tokenize(["a <new> face"]).items()
    assert np.array_equal(sd.embed(encoder, ids), wanted.embed(encoder, wanted.tokenize(["a <new> face"])[encoder]))


def test_training_goes_on_from_the_files(learned, folder):
    trained, _ = learned
    base = models()[0]
    again, frozen = METHOD.split(base, None)
    found, _ = run_folder.start(METHOD, again, frozen, str(folder), kinds.opened(folder, base))
    assert trees.digest(found) == trees.digest(trained)
    other = Chain((METHOD.parts[0], CustomDiffusion()))
    with pytest.raises(ValueError, match="its weights are not this method's: .*attn2.to_out.0.bias"):
        run_folder.start(other, *other.split(base, None), str(folder), kinds.opened(folder, base))
    other = Chain((dataclasses.replace(METHOD.parts[0], word="<other>"), METHOD.parts[1]))
    with pytest.raises(ValueError, match=r"no rows .*\[1, 32\].* of the word '<other>'"):
        run_folder.start(other, *other.split(base, None), str(folder), kinds.opened(folder, base))


@pytest.mark.parametrize("query", [False, True])
def test_with_a_lora_of_other_weights_each_has_its_file(query, tmp_path):
    method = Chain((CustomDiffusion(query), Lora(rank=2, targets=r"attn1\.to_")))
    trained, frozen = method.split(models()[0], jax.random.key(1))
    random = np.random.default_rng(3)
    trained = jax.tree.map(lambda x: x + np.float32(0.1) * random.standard_normal(x.shape, np.float32), trained)
    run_folder.export(method, frozen, trained, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["lora.safetensors", "pytorch_custom_diffusion_weights.safetensors"]
    sd = models()[0]
    for file in files:
        sd = sdjax.attach(sd, file)
    one, other = (trees.flatten(x.parts["unet"]) for x in (sd, method.join(frozen, trained).fold()))
    assert all(np.allclose(one[name], other[name], atol=1e-6) for name in other)


def test_the_program_writes_the_file_again_and_refuses_layouts_without_a_place_for_it(folder, tmp_path, capsys):
    sdjax.save(models()[0], tmp_path / "base")
    path, tail = folder / "pytorch_custom_diffusion_weights.safetensors", ["--model", str(tmp_path / "base")]
    line = ["adapters", "merge", str(path), *tail, "--out"]
    assert main([*line, str(tmp_path / "x.safetensors")]) == 1
    assert "--format='kohya': expected a format for this adapter: custom_diffusion\n" in capsys.readouterr().err
    assert main([*line, str(tmp_path / "again"), "--format", "custom_diffusion"]) == 0
    again = tmp_path / "again" / path.name
    one, other = (safetensors.numpy.load_file(file) for file in (path, again))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert headers.metadata(again)["settings"] == headers.metadata(path)["settings"]
