"""SDXL's shape as one file, two_encoders.py: it draws, trains and travels through the same pure functions and files."""

import importlib
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import tiny
import torch
from test_shapes import HOW, apart, batch, learn, moved

import sdjax
import sdjax.families
from sdjax import trees
from sdjax.formats import pipeline
from sdjax.methods.lora import Lora
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training import run_folder

HERE = Path(__file__).parent
PROMPT, NEGATIVE = "a photo of a face on the beach", "red hair"
WORD = "<new>"
ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Returns the family's module, in the package for the time of these tests."""
    folder, package = tmp_path_factory.mktemp("families"), sdjax.families
    (folder / "two_encoders.py").write_text((HERE / "two_encoders.py").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "__path__", [*package.__path__, str(folder)])
        name = f"{package.__name__}.two_encoders"
        patch.setitem(sys.modules, name, None)
        patch.delitem(sys.modules, name)
        yield importlib.import_module(name)


@pytest.fixture(scope="module")
def sd(family):
    return family.model()


@pytest.fixture(scope="module")
def theirs(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.theirs(sd, folder, diffusers.StableDiffusionXLPipeline), folder


def picture(pipe, prompt=PROMPT, negative=NEGATIVE, **more):
    """Returns diffusers' picture [H W 3] of the noise that seed 4 stands for."""
    noise = torch.from_numpy(np.array(tiny.start_noise([4])).transpose(0, 3, 1, 2).copy())
    given = dict(num_inference_steps=HOW["steps"], guidance_scale=HOW["guidance"], height=32, width=32, latents=noise)
    made = pipe(prompt, negative_prompt=negative, output_type="np", **given | more).images[0]
    return np.round(made * 255)


def drawn(sd, prompt=PROMPT, negative=NEGATIVE, **more):
    return sdjax.text2img(sd, [prompt], negative_prompt=negative, **HOW, **more)[0]


def test_pictures_are_those_of_diffusers(sd, theirs):
    """Two contexts side by side, the pooled text and the six sizes, on both sides of guidance."""
    np.testing.assert_allclose(drawn(sd), picture(theirs[0]), atol=1)


def test_clip_skip_counts_from_the_last_layer_but_one(sd, theirs):
    """diffusers leaves the negative prompt's layer as it is, so that the texts are compared without guidance."""
    wanted = theirs[0].encode_prompt(PROMPT, clip_skip=1, do_classifier_free_guidance=False)
    cond = sd.condition(sd.tokenize([PROMPT]), skip=1)
    for mine, name in ((cond.unet.context, 0), (cond.unet.pooled, 2)):
        np.testing.assert_allclose(mine, wanted[name].detach().numpy(), atol=1e-4)


def test_what_is_told_acts(sd):
    """Pooled text and size reach the UNet, and are what diffusers says they are."""
    z, t = jax.random.normal(jax.random.key(3), (1, 16, 16, 4)), jnp.full(1, 400)
    ids = sd.tokenize([PROMPT])
    assert not np.array_equal(ids["text_encoder"], ids["text_encoder_2"])
    cond = sd.condition(ids)
    assert cond.unet.context.shape == (1, 16, 32 + 48) and cond.unet.pooled.shape == (1, 24)
    told = sd.family.told(sd, z, cond.unet)
    np.testing.assert_array_equal(told.size, [[32, 32, 0, 0, 32, 32]])

    @jax.jit
    def predict(sd, told):
        return sd.call("unet", z, t, told.context, pooled=told.pooled, size=told.size)[0]

    plain = predict(sd, told)
    for other in (told.replace(pooled=-told.pooled), told.replace(size=2 * told.size)):
        assert np.abs(predict(sd, other) - plain).max() > 1e-3


def test_long_and_weighed_prompts_have_one_pooled_text(sd):
    long = ", ".join([PROMPT] * 3)
    plain, weighed = (drawn(sd, text, grammar="a1111") for text in (long, f"({long}:1.3)"))
    assert apart(plain, weighed) > 0.3 and apart(drawn(sd), drawn(sd, grammar="a1111")) == 0


def test_frames_between_two_prompts_end_at_their_pictures(sd):
    how = dict(steps=2, seeds=4, guidance=3.0)
    frames = sdjax.interpolate(sd, [PROMPT, "a mosaic of a cat"], 3, **how)
    ends = [sdjax.text2img(sd, [text], **how | {"seeds": [4]})[0] for text in (PROMPT, "a mosaic of a cat")]
    np.testing.assert_allclose(frames[0], ends[0], atol=1)
    np.testing.assert_allclose(frames[-1], ends[1], atol=1)


def test_a_folder_comes_back(sd, theirs):
    again = pipeline.load(theirs[1])
    assert again.family == sd.family
    jax.tree.map(np.testing.assert_array_equal, again.tokenize([PROMPT]), sd.tokenize([PROMPT]))
    for part, tree in sd.parts.items():
        assert trees.digest(again.parts[part]) == trees.digest(tree)


# ---- a word --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inverted(sd):
    """Returns (method, frozen, [states]) of a word with rows in both encoders."""
    method = TextualInversion(WORD, "face", 2)
    rows = batch(sd.add_word(WORD, 2, "face"))
    rows["ids"] = sd.add_word(WORD, 2, "face").tokenize([f"a photo of {WORD}"] * 2)
    return method, *learn(method, sd, rows, tx=optax.sgd(0.1))


def test_a_word_learns_rows_of_both_encoders(sd, inverted):
    method, frozen, states = inverted
    assert moved(*states[:2]) == {f"rows.{encoder}" for encoder in ENCODERS}
    assert [states[0]["trained"]["rows"][one].shape for one in ENCODERS] == [(2, 32), (2, 48)]
    said = f"a photo of {WORD}"
    one, other = (drawn(method.join(frozen, states[i]["trained"]), said) for i in (0, -1))
    assert apart(one, other) > 0.3


def test_a_word_is_written_as_two_tensors_that_diffusers_loads(sd, theirs, inverted, tmp_path):
    method, frozen, states = inverted
    trained = jax.tree.map(lambda x: 20 * x, states[-1]["trained"])  # the picture shows it
    path, lines = run_folder.export(method, frozen, trained, tmp_path)
    held = safetensors.numpy.load_file(path)
    assert {name: x.shape for name, x in held.items()} == {"clip_l": (2, 32), "clip_g": (2, 48)}
    assert path.name == "new.safetensors" and sum(line.startswith("diffusers") for line in lines) == 2
    said = f"a photo of {WORD}"
    mine = drawn(sdjax.attach(sd, path), said)
    np.testing.assert_array_equal(mine, drawn(method.join(frozen, trained), said))
    pipe = diffusers.StableDiffusionXLPipeline(**theirs[0].components)
    pipe.set_progress_bar_config(disable=True)
    tensors = safetensors.torch.load_file(path)
    pipe.load_textual_inversion(tensors["clip_l"], WORD, tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    pipe.load_textual_inversion(tensors["clip_g"], WORD, tokenizer=pipe.tokenizer_2, text_encoder=pipe.text_encoder_2)
    np.testing.assert_allclose(mine, picture(pipe, said), atol=1)


def test_embeddings_of_one_encoder_are_refused(sd, tmp_path):
    for name, width, encoder in (("clip_l", 32, "text_encoder"), ("clip_g", 48, "text_encoder_2")):
        safetensors.numpy.save_file({name: np.ones((1, width), np.float32)}, tmp_path / "toy.safetensors")
        with pytest.raises(
            ValueError, match=f"an embedding for {encoder}; this model has text_encoder, text_encoder_2"
        ):
            sdjax.attach(sd, tmp_path / "toy.safetensors")


# ---- LoRA ----------------------------------------------------------------------------------------

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


@pytest.fixture(scope="module")
def lora(sd):
    """Returns (method, frozen, [states]) of a LoRA of the UNet and both encoders."""
    method = Lora(2, text_encoder=True)
    return method, *learn(method, sd, batch(sd))


def test_a_lora_learns_in_all_three_networks(sd, lora):
    method, frozen, (start, first, second) = lora
    names = set(trees.flatten(start["trained"]))
    assert {name.partition(".")[0] for name in names} == set(PREFIXES)
    last = "text_model.encoder.layers.2"  # of text_encoder, whose last layer nothing reads
    read = {name for name in names if not name.startswith(f"text_encoder.{last}")}
    assert moved(start, first) == {name for name in read if name.endswith("up")}
    assert moved(first, second) == read and read < names
    assert apart(drawn(sd), drawn(method.join(frozen, second["trained"]))) > 0.3


def test_a_lora_is_written_under_kohyas_names_and_diffusers(sd, theirs, lora, tmp_path):
    method, frozen, states = lora
    trained = jax.tree.map(lambda x: 3 * x, states[-1]["trained"])
    path, _ = run_folder.export(method, frozen, trained, tmp_path)
    names = safetensors.numpy.load_file(path)
    assert {name.partition("_text_model")[0].partition("_down")[0].partition("_mid")[0].partition("_up")[0]
            for name in names} == set(PREFIXES.values())  # fmt: skip
    mine = drawn(method.join(frozen, trained))
    np.testing.assert_allclose(drawn(sdjax.attach(sd, path)), mine, atol=1)
    pipe = diffusers.StableDiffusionXLPipeline(**theirs[0].components)
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe.load_lora_weights(path)
        np.testing.assert_allclose(mine, picture(pipe), atol=1)
    finally:
        pipe.unload_lora_weights()


def test_an_sd1_lora_does_not_fit(sd, tmp_path):
    tensors = {f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{one}.weight": np.ones((32, 32), np.float32)
               for one in ("up", "down")}  # fmt: skip
    safetensors.numpy.save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="belong to no weight of this model"):
        sdjax.attach(sd, tmp_path / "one.safetensors")
