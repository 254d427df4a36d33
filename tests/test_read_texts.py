"""What training reads of a caption: the text encoder's layer (clip skip)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch_step
from PIL import Image

from sdjax import trees
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.methods.clip import Clip
from sdjax.methods.full import Full
from sdjax.methods.lora import Lora
from sdjax.sampling import generate
from sdjax.settings import SettingError
from sdjax.training import facts, preview, run_folder
from sdjax.training.begin import begin
from sdjax.training.settings import Train
from sdjax.training.step import default_loss

DATA = Data(path="pocketland", size=32, batch=2, source=Pocketland(count=6))
RUN = Train(model="random:tiny", method=Full(("unet",), "attn2"), data=DATA)


def loss_of(settings, step=0):
    """Returns the loss of a run's first batch, and what keeps its texts."""
    trained, frozen, data, _ = begin(settings)
    value, _ = jax.jit(default_loss(settings.method, settings))(frozen, trained, data[step], jax.random.key(step), 0)
    return float(value), data.texts


def exported(settings, out):
    """Returns the header of the file that a run of no steps writes, and the lines on its use."""
    trained, frozen, _, _ = begin(settings)
    path, lines = run_folder.export(settings.method, frozen, trained, out / "export", **facts.told(settings, out, 0))
    with safetensors.safe_open(path, "np") as file:
        return file.metadata(), lines


def test_gradients_at_clip_skip_2_are_torchs():
    sd, unet, text = torch_step.models()
    method = Full(("text_encoder",), "q_proj|mlp|final_layer_norm")
    trained, frozen = method.split(sd)
    batch, key = torch_step.batch(sd, ["a photo of a cat", "a dog"]), jax.random.key(3)
    loss = default_loss(method, Train(method=method, clip_skip=2))
    ours = lambda trained, frozen: loss(frozen, trained, batch, jax.random.clone(key), jnp.int32(0))[0]  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(ours))(trained, frozen)
    seen, text = torch_step.drawn(sd, batch, key), torch_step.fresh(text)
    prediction = unet(seen["z_t"], seen["t"], torch_step.context(text, batch["ids"]["text_encoder"], skip=1)).sample
    there = ((prediction - seen["noise"]) ** 2).mean()
    there.backward()
    assert float(value) == pytest.approx(there.item(), rel=1e-5)
    named = {"text_model." + name.removeprefix("text_model."): weight for name, weight in text.named_parameters()}
    torch_step.assert_same_gradients(grads["text_encoder"], named)
    sizes = {name: float(jnp.abs(grad).max()) for name, grad in trees.flatten(grads["text_encoder"]).items()}
    last, first = (f"text_model.encoder.layers.{i}.mlp.fc1.kernel" for i in (1, 0))
    assert sizes[last] == 0 < sizes[first]


def test_clip_skip_has_a_cache_of_its_own(tmp_path):
    run = dataclasses.replace(RUN, clip_skip=2)
    plain, _ = loss_of(run)
    assert plain != loss_of(RUN)[0]
    kept = dataclasses.replace(DATA, cache=str(tmp_path))
    _, first = loss_of(dataclasses.replace(RUN, data=kept))
    found, texts = loss_of(dataclasses.replace(run, data=kept))
    assert found == pytest.approx(plain, rel=2e-5) and texts.which != first.which


def test_previews_and_files_have_the_runs_clip_skip(tmp_path, monkeypatch):
    drawn = []
    blank = np.zeros((preview.SEEDS, 8, 8, 3), np.uint8)
    monkeypatch.setattr(generate, "text2img", lambda sd, prompts, **how: drawn.append(how["clip_skip"]) or blank)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "0.png")
    (tmp_path / "lines.txt").write_text("a cat\n")
    run = Train(
        model="random:tiny", method=Lora(rank=2), data=Data(path=str(tmp_path / "photos"), size=32, templates="none"),
        clip_skip=2, prompts=("a cat",), prompts_file=str(tmp_path / "lines.txt"),
    )  # fmt: skip
    preview.sheet(run.method, None, None, run)
    preview.lines(tmp_path / "samples", 1, None, run)
    assert drawn == [2, 2]
    said, lines = exported(run, tmp_path / "two")
    assert (said["ss_clip_skip"], said["modelspec.encoder_layer"]) == ("2", "2")
    assert lines[-1].endswith("here --clip-skip 2")
    said, lines = exported(dataclasses.replace(run, clip_skip=1), tmp_path / "one")
    assert said["ss_clip_skip"] == "1" and "modelspec.encoder_layer" not in said
    assert not any("clip-skip" in line for line in lines)


def test_a_clip_skip_that_does_not_fit_is_refused():
    with pytest.raises(SettingError, match="clip_skip=9: expected 1 to 2, the layers of the text encoder"):
        begin(dataclasses.replace(RUN, clip_skip=9))
    with pytest.raises(SettingError, match="clip_skip=2: expected 1: Clip has its own loss"):
        begin(dataclasses.replace(RUN, method=Clip(), clip_skip=2))
