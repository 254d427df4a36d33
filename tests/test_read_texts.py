"""What training reads of a caption: the text encoder's layer (clip skip), and how many tokens (chunks)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch_step
from PIL import Image

from sdjax import trees
from sdjax.data import lengths
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.diffusion.loss import conditioned
from sdjax.formats import pipeline
from sdjax.methods.clip import Clip
from sdjax.methods.full import Full
from sdjax.methods.lora import Lora
from sdjax.runtime import processes
from sdjax.sampling import generate
from sdjax.settings import SettingError
from sdjax.text import conditioning
from sdjax.training import facts, preview, run_folder
from sdjax.training.begin import begin
from sdjax.training.loop import train
from sdjax.training.settings import Train
from sdjax.training.step import default_loss

DATA = Data(path="pocketland", size=32, batch=2, source=Pocketland(count=6))
RUN = Train(model="random:tiny", method=Full(("unet",), "attn2"), data=DATA)


def first_batch(settings):
    """Returns (sd, the first batch of a run, what keeps its texts)."""
    trained, frozen, data, _ = begin(settings)
    return settings.method.join(frozen, trained), data[0], data.texts


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


def test_kept_texts_are_those_of_the_clip_skip(tmp_path):
    data, found = dataclasses.replace(DATA, cache=str(tmp_path)), {}
    for clip_skip in (1, 2):
        sd, batch, texts = first_batch(dataclasses.replace(RUN, data=data, clip_skip=clip_skip))
        found[clip_skip] = batch["text"]["context"]
        np.testing.assert_allclose(found[clip_skip], sd.condition(batch["ids"], clip_skip - 1).unet.context, atol=1e-5)
    assert np.abs(found[1] - found[2]).max() > 0.01 and "skip 1" in texts.which
    cond = conditioned(sd, batch, 1)
    assert cond.skip == 1 and cond.unet.context is batch["text"]["context"]


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
    sd = pipeline.load("random:tiny")
    preview.sheet(run.method, sd, None, run)
    preview.lines(tmp_path / "samples", 1, sd, None, run)
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


LONG = "a photo of a cat, a dog and a face on the beach (with a hat), a mosaic of a [face], two cats"


def test_chunks_are_those_of_sampling_and_transformers_output():
    sd, _, text = torch_step.models()
    count = len(conditioning.literal(sd.tokenizers["text_encoder"], LONG))
    assert count > 2
    ids = conditioning.tokens(sd.tokenizers, [LONG, "a cat"], count)
    cond = sd.condition(ids, skip=1)
    plain = LONG.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[").replace("]", r"\]")
    _, sampled, _ = conditioning.condition(sd, [plain, "a cat"], skip=1, grammar="a1111")
    assert cond.words["text_encoder"]["ids"].tolist() == sampled.words["text_encoder"]["ids"].tolist()
    np.testing.assert_allclose(cond.unet.context, sampled.unet.context, atol=1e-5)
    wanted = [torch_step.context(text, ids["text_encoder"][:, i], skip=1).numpy(force=True) for i in range(count)]
    np.testing.assert_allclose(cond.unet.context, np.concatenate(wanted, 1), atol=1e-4)
    fewer = conditioning.tokens(sd.tokenizers, [LONG], 2)["text_encoder"]
    np.testing.assert_array_equal(fewer[0], ids["text_encoder"][0, :2])
    np.testing.assert_array_equal(
        conditioning.tokens(sd.tokenizers, [LONG])["text_encoder"], sd.tokenize([LONG])["text_encoder"]
    )


@pytest.fixture
def captioned(tmp_path):
    """Returns Data of three pictures, two of which have captions of three chunks or more."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, words in enumerate((LONG, "a cat", LONG)):
        Image.new("RGB", (32, 32), (90 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(words)
    return Data(path=str(folder), size=32, batch=3)


def test_a_run_reads_more_chunks_and_says_what_it_cuts(captioned, tmp_path, monkeypatch):
    kept = dataclasses.replace(captioned, chunks=2, cache=str(tmp_path / "cache"))
    sd, batch, _ = first_batch(dataclasses.replace(RUN, data=kept))
    assert batch["ids"]["text_encoder"].shape == (3, 2, 16) and batch["text"]["context"].shape[1] == 32
    np.testing.assert_allclose(batch["text"]["context"], sd.condition(batch["ids"]).unet.context, atol=1e-5)
    monkeypatch.setattr(lengths, "CHUNKS", (1, 2))
    said = []
    monkeypatch.setattr(processes, "say", said.append)
    for chunks in (1, 2):
        data = dataclasses.replace(captioned, chunks=chunks)
        train(dataclasses.replace(RUN, data=data, steps=0, checkpoint=0), tmp_path / f"out{chunks}")
    assert [line for line in said if line.startswith("captions")] == [
        "captions: 2 of 3 are longer than 14 tokens and are cut off; data.chunks=2 reads up to 28",
        "captions: 2 of 3 are longer than 28 tokens and are cut off",
    ]
    assert lengths.cut(["a cat"], begin(RUN)[1].tokenizers, 1) == ""


def test_files_say_how_many_tokens_were_read(captioned, tmp_path):
    run = Train(model="random:tiny", method=Lora(rank=2), data=captioned)
    assert exported(run, tmp_path / "one")[0]["ss_max_token_length"] == "None"
    said, _ = exported(dataclasses.replace(run, data=dataclasses.replace(captioned, chunks=3)), tmp_path / "three")
    assert said["ss_max_token_length"] == "42"  # kohya's 225 for 75 tokens of a chunk; here it has 14
    with pytest.raises(SettingError, match="chunks=4: expected one of 1, 2, 3"):
        Data(chunks=4)
