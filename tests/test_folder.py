"""Folders that diffusers wrote load here with the same numbers; folders that we write load there bit for bit."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from sdjax import tasks, trees
from sdjax.convert import main
from sdjax.formats import pipeline
from sdjax.formats.models import presets
from sdjax.formats.storage import parameters
from sdjax.models.clip import ImageConfig, ImageEncoder, TextConfig, TextEncoder, clip_pixels
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import AutoencoderKL, VaeConfig
from sdjax.text.tokenizer import Tokenizer

PARTS = ("unet", "vae", "text_encoder", "image_encoder")
TEXTS = ["a photo of a woman on the beach", "a sketch of a man in the snow"]
WIDTHS = {"block_out_channels": (32, 64), "norm_num_groups": 8}
UNET = {
    **WIDTHS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "sample_size": 16,
}
VAE = {**WIDTHS, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
VISION |= {"image_size": 32, "patch_size": 8, "projection_dim": 24}
KINDS = {
    "sd1": (
        {"cross_attention_dim": 32, "attention_head_dim": 4},
        {"num_hidden_layers": 3, "hidden_act": "quick_gelu"},
        {"prediction_type": "epsilon"},
    ),
    "sd2": (
        {"cross_attention_dim": 32, "attention_head_dim": (2, 4), "use_linear_projection": True},
        {"num_hidden_layers": 2, "hidden_act": "gelu"},
        {"prediction_type": "v_prediction"},
    ),
    "inpaint": (
        {"cross_attention_dim": 32, "attention_head_dim": 4, "in_channels": 9},
        {"num_hidden_layers": 1, "hidden_act": "quick_gelu"},
        {"prediction_type": "epsilon"},
    ),
}


def random_weights(model, seed):
    """Fills every weight, those that start as zero or one included, with small noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.1
            weight.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def make_pipeline(kind, folder):
    """Returns a small random pipeline of diffusers, and writes it into folder / "model"."""
    unet, text, schedule = KINDS[kind]
    (folder / "words").mkdir()
    Tokenizer.train(TEXTS, 560, length=16).save(folder / "words")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "words")
    text = transformers.CLIPTextConfig(**TEXT, **text, vocab_size=560, eos_token_id=tokenizer.eos_token_id)
    parts = {
        "unet": random_weights(diffusers.UNet2DConditionModel(**UNET, **unet), 1),
        "vae": random_weights(diffusers.AutoencoderKL(**VAE), 2),
        "text_encoder": random_weights(transformers.CLIPTextModel(text), 3),
        "tokenizer": tokenizer,
        "scheduler": diffusers.PNDMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            skip_prk_steps=True,
            **schedule,
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }
    kind = diffusers.StableDiffusionInpaintPipeline if kind == "inpaint" else diffusers.StableDiffusionPipeline
    theirs = kind(**parts, requires_safety_checker=False)
    theirs.save_pretrained(folder / "model", safe_serialization=True)
    return theirs


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def saved(request, tmp_path_factory):
    """(torch pipeline, its folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    return make_pipeline(request.param, folder), folder / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that we wrote, image encoder included."""
    return pipeline.save(pipeline.load("random:tiny"), tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def copy(folder, tmp_path):
    return pathlib.Path(shutil.copytree(folder, tmp_path / "model"))


def there(tree, name="model"):
    """{path: bytes} of all files under a folder: what must not change."""
    return {str(path.relative_to(tree)): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}


def equal(first, second):
    first, second = trees.flatten(first), trees.flatten(second)
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        assert leaf.dtype == second[name].dtype, name
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def run(sd, part, *inputs):
    """Returns what a part computes, compiled: one compilation is cheaper than one per layer."""
    return jax.jit(sd.networks[part].apply)({"params": sd.parts[part]}, *inputs)


def channels_first(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1)))


def channels_last(tensor):
    return tensor.movedim(1, -1)


@torch.no_grad()
def test_what_diffusers_wrote_computes_the_same_here(saved):
    """Square kernels would load in any orientation; only their use shows it."""
    theirs, folder = saved
    sd, rng = pipeline.load(folder), np.random.default_rng(0)
    np.testing.assert_allclose(sd.schedule.alphas_cumprod, theirs.scheduler.alphas_cumprod, rtol=1e-5)
    assert sd.schedule.prediction_type == theirs.scheduler.config.prediction_type
    ids = sd.tokenize(TEXTS)
    options = {"padding": "max_length", "truncation": True, "max_length": 16, "return_tensors": "pt"}
    np.testing.assert_array_equal(ids["text_encoder"], theirs.tokenizer(TEXTS, **options).input_ids)
    cond = jax.jit(type(sd).condition)(sd, ids)
    context = theirs.text_encoder(torch.from_numpy(ids["text_encoder"]).long())[0]
    close(cond.unet.context, context)
    z = rng.standard_normal((2, 8, 8, theirs.unet.config.in_channels)).astype(np.float32)
    t = torch.tensor([7, 901])
    prediction, _ = run(sd, "unet", z, jnp.array([7, 901]), cond.unet.context)
    close(prediction, channels_last(theirs.unet(channels_first(z), t, context).sample))
    if sd.schedule.prediction_type != "epsilon":
        return  # the same autoencoder again
    pixels = rng.uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    close(
        jax.jit(type(sd).moments)(sd, pixels),
        channels_last(theirs.vae.encode(channels_first(pixels)).latent_dist.parameters),
    )
    close(
        jax.jit(type(sd).decode)(sd, z[..., :4] * sd.scaling),
        channels_last(theirs.vae.decode(channels_first(z[..., :4])).sample),
    )


@pytest.mark.parametrize("dtype, shard_size", [("float32", 10**10), ("float16", 200_000), ("bfloat16", 10**10)])
def test_what_we_write_loads_in_diffusers_bit_for_bit(saved, tmp_path, dtype, shard_size):
    theirs, folder = saved
    bit_for_bit(theirs, folder, tmp_path, dtype, shard_size)


def test_inpainting_models_are_written_as_such(tmp_path):
    bit_for_bit(make_pipeline("inpaint", tmp_path), tmp_path / "model", tmp_path, "float32", 10**10)


def bit_for_bit(theirs, folder, tmp_path, dtype, shard_size):
    sd = pipeline.load(folder, dtype)
    pipeline.save(sd, tmp_path / "out", shard_size=shard_size)
    index = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists() == (shard_size < 10**6)
    kind = getattr(torch, dtype)
    back = type(theirs).from_pretrained(tmp_path / "out", dtype=kind)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == type(theirs).__name__
    for part in ("unet", "vae", "text_encoder"):
        wanted, got = getattr(theirs, part).state_dict(), getattr(back, part).state_dict()
        assert wanted.keys() == got.keys()
        for name, weight in wanted.items():
            assert got[name].dtype == kind and torch.equal(weight.to(kind), got[name]), (part, name)
    assert back.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    again = pipeline.load(tmp_path / "out", None)
    for part in PARTS:
        equal(sd.parts.get(part, {}), again.parts.get(part, {}))
    assert (again.schedule, again.networks["unet"].config) == (sd.schedule, sd.networks["unet"].config)


@torch.no_grad()
def test_the_whole_pipeline_draws_the_same_picture(saved, tmp_path):
    theirs, folder = saved
    pipeline.save(pipeline.load(folder), tmp_path / "out")
    back = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    ddim = {"clip_sample": False, "set_alpha_to_one": False}
    scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, **ddim)
    theirs = type(theirs)(**{**theirs.components, "scheduler": scheduler}, requires_safety_checker=False)
    assert type(back.scheduler) is type(theirs.scheduler)
    pictures = []
    for pipe in (theirs, back):
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        pictures.append(pipe(TEXTS[:1], num_inference_steps=3, generator=noise, output_type="np").images)
    np.testing.assert_array_equal(*pictures)


def test_a_folder_in_half_precision_and_shards_of_diffusers(saved, tmp_path):
    theirs, folder = saved
    half = type(theirs).from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="300KB")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    sd = pipeline.load(tmp_path / "half", "float16")
    for part in ("unet", "vae", "text_encoder"):
        equal(sd.parts[part], trees.cast(pipeline.load(folder).parts[part], "float16"))
    equal(sd.parts["unet"], pipeline.load(tmp_path / "half", None).parts["unet"])
    equal(sd.parts["unet"], pipeline.load(tmp_path / "half", "float16", variant="fp16").parts["unet"])


def test_types(folder):
    for dtype in ("float32", "float16", "bfloat16", None):
        sd = pipeline.load(folder, dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves((sd.parts["unet"], sd.parts["vae"]))} == {
            dtype or "float32"
        }
        assert sd.networks["unet"].dtype == jnp.dtype(dtype or "float32")
    with pytest.raises(ValueError, match="dtype='int8': expected one of float32"):
        pipeline.load(folder, "int8")


def test_saved_again_is_the_same_folder(folder, tmp_path):
    pipeline.save(pipeline.load(folder), tmp_path / "again")
    assert there(folder) == there(tmp_path / "again")


def test_image_encoder_and_its_processor_load_in_diffusers(folder):
    back = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    sd = pipeline.load(folder)
    assert type(back.image_encoder).__name__ == "CLIPVisionModelWithProjection"
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    prepared = clip_pixels(jnp.array(pixels), 32)
    with torch.no_grad():
        close(run(sd, "image_encoder", prepared)[0], back.image_encoder(channels_first(prepared)).image_embeds)
    assert back.feature_extractor.crop_size == {"height": 32, "width": 32}
    picture = np.uint8(np.round((pixels[0] + 1) * 127.5))
    theirs = back.feature_extractor(picture, return_tensors="np").pixel_values
    ours = clip_pixels(jnp.array(picture[None], jnp.float32) / 127.5 - 1, 32)
    np.testing.assert_allclose(np.moveaxis(theirs, 1, -1), ours, atol=1e-5)


def test_placeholder_words_travel(folder, tmp_path):
    sd = pipeline.load(folder).add_word("<me>", 2, init="face")
    pipeline.save(sd, tmp_path / "out")
    back = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    again = pipeline.load(tmp_path / "out")
    equal(again.parts["text_encoder"], sd.parts["text_encoder"])
    np.testing.assert_array_equal(again.rows("<me>")["text_encoder"], sd.rows("<me>")["text_encoder"])
    prompt = back.maybe_convert_prompt("a photo of <me>", back.tokenizer)
    theirs = back.tokenizer(prompt, padding="max_length", max_length=16).input_ids
    np.testing.assert_array_equal(again.tokenize(["a photo of <me>"])["text_encoder"][0], theirs)
    with torch.no_grad():
        context = back.text_encoder(torch.tensor([theirs]))[0]
    close(jax.jit(type(sd).condition)(again, again.tokenize(["a photo of <me>"])).unet.context, context)


# ---- other spellings ---------------------------------------------------------------------------


def rewrite(folder, stem, change):
    """Rewrites a file of weights with every (name, tensor) changed by change(name, tensor) -> {name: tensor}."""
    from safetensors.torch import load_file, save_file

    path = folder / f"{stem}.safetensors"
    weights = {}
    for name, tensor in load_file(path).items():
        weights |= {key: value.contiguous() for key, value in change(name, tensor).items()}
    save_file(weights, path, metadata={"format": "pt"})


def old_attention(name, tensor):
    if ".attentions.0.to_" in name or ".attentions.0.query." in name:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return {name: tensor}


def convolutions(name, tensor):
    return {name: tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor}


SPELLINGS = {
    "old names of the autoencoder's attention": ("vae", "diffusion_pytorch_model", old_attention),
    "the autoencoder's attention as convolutions": ("vae", "diffusion_pytorch_model", convolutions),
    "linear projections": (
        *("unet", "diffusion_pytorch_model"),
        lambda name, tensor: {
            name: tensor[:, :, 0, 0] if "proj_in.weight" in name or "proj_out.weight" in name else tensor
        },
    ),
    "no prefix": ("text_encoder", "model", lambda name, tensor: {name.removeprefix("text_model."): tensor}),
    "no prefix, image": ("image_encoder", "model", lambda name, tensor: {name.removeprefix("vision_model."): tensor}),
    "position_ids": (
        *("text_encoder", "model"),
        lambda name, tensor: {name: tensor, "text_model.embeddings.position_ids": torch.arange(16)[None]},
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings(folder, copy, spelling):
    part, stem, change = SPELLINGS[spelling]
    before = (copy / part / f"{stem}.safetensors").read_bytes()
    rewrite(copy / part, stem, change)
    assert (copy / part / f"{stem}.safetensors").read_bytes() != before
    equal(pipeline.load(copy).parts[part], pipeline.load(folder).parts[part])


@pytest.mark.parametrize("layout", ["CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "model"])
def test_image_encoders_of_other_layouts(folder, tmp_path, layout):
    if layout == "model":
        sd, place = pipeline.load(folder), folder
        projection, hidden = sd.parts["image_encoder"]["visual_projection"]["kernel"].T, None
    else:
        place = tmp_path / layout
        config = transformers.CLIPVisionConfig(**VISION)
        if layout == "CLIPModel":
            config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20)
        model = random_weights(getattr(transformers, layout)(config), 5)
        model.save_pretrained(place)
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        vision = model if layout == "CLIPVisionModel" else model.vision_model
        with torch.no_grad():
            hidden = vision(pixels).last_hidden_state
        projection = getattr(model, "visual_projection", None)
        projection = np.zeros((24, 32), np.float32) if projection is None else projection.weight.detach().numpy()
    sd = pipeline.load("random:tiny", vision=place)
    np.testing.assert_array_equal(sd.parts["image_encoder"]["visual_projection"]["kernel"].T, projection)
    if hidden is not None:
        close(run(sd, "image_encoder", channels_last(pixels).numpy())[2], hidden)
        pipeline.save(sd, tmp_path / "out")
        equal(pipeline.load(tmp_path / "out").parts["image_encoder"], sd.parts["image_encoder"])


def test_built_in_towers():
    """Sizes only: making the weights would take minutes."""
    with pytest.raises(ValueError, match="vision='random:vit-x': expected one of random:vit-l, random:vit-h"):
        pipeline.load("random:tiny", vision="random:vit-x")
    config = ImageConfig(**presets.TOWERS["vit-l"])
    assert trees.count(parameters.template(ImageEncoder(config))) == 303_966_208  # transformers' count


# ---- built-in shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name, unet, text", [("sd15", 859_520_964, 123_060_480), ("sd21", 865_910_724, 340_387_840)])
def test_built_in_shapes_have_the_sizes_of_the_real_models(name, unet, text):
    """Numbers of parameters: those that diffusers and transformers print for the published folders."""
    shape = presets.SHAPES[name]
    unet_network = UNet(UNetConfig(**shape["unet"]))
    assert trees.count(parameters.template(unet_network)) == unet
    assert trees.count(parameters.template(TextEncoder(TextConfig(**shape["text_encoder"])))) == text
    assert trees.count(parameters.template(AutoencoderKL(VaeConfig(**shape["vae"])))) == 83_653_863


@pytest.mark.parametrize("name, task", [("sd15-inpainting", "inpainting"), ("x4", "upscaling"), ("sd21", "text2img")])
def test_built_in_shapes_have_their_task(name, task):
    """And the autoencoder of diffusers with the same options, without memory."""
    sd = pipeline.shape(name)
    assert tasks.of(sd, "").name == task
    with torch.device("meta"):
        options = {key: value for key, value in presets.SHAPES[name]["vae"].items() if key != "scaling_factor"}
        blocks = len(options["block_out_channels"])
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
        theirs = diffusers.AutoencoderKL(**options, **kinds)
    assert trees.count(sd.parts["vae"]) == sum(x.numel() for x in theirs.parameters())
    assert sd.factor == (4 if name == "x4" else 8)


def test_random_models_are_the_same_every_time_and_compute_something():
    sd = pipeline.load("random:tiny")
    equal(sd.parts["unet"], pipeline.load("random:tiny").parts["unet"])
    cond = jax.jit(type(sd).condition)(sd, sd.tokenize(["a face"]))
    prediction = jax.jit(type(sd).predict)(sd, jnp.ones((1, 16, 16, 4)), jnp.ones(1), cond)
    assert 0.1 < float(jnp.std(prediction)) < 10 and len(sd.tokenizers["text_encoder"].ids("face")) == 1
    with pytest.raises(ValueError, match="random:sd3.*expected one of random:sd15, random:sd21.*random:tiny"):
        pipeline.load("random:sd3")


# ---- mistakes ----------------------------------------------------------------------------------


def refused(load, *words):
    with pytest.raises(ValueError) as error:
        load()
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def drop(*dropped):
    return lambda name, tensor: {} if name in dropped else {name: tensor}


def test_missing_unexpected_and_misshapen_weights(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    good = path.read_bytes()
    rewrite(path.parent, path.stem, drop("conv_in.weight", "conv_out.bias"))
    refused(lambda: pipeline.load(copy), path, "missing conv_in.weight, conv_out.bias (2)")
    path.write_bytes(good)
    count = len(trees.flatten(pipeline.load(copy).parts["unet"]))
    rewrite(path.parent, path.stem, lambda name, tensor: {name: tensor, f"ema.{name}": tensor.clone()})
    refused(lambda: pipeline.load(copy), path, "unexpected ema.conv_in.bias, ema.conv_in.weight", f"... ({count})")
    path.write_bytes(good)
    rewrite(path.parent, path.stem, lambda name, tensor: {name: tensor[:-1] if name == "conv_in.weight" else tensor})
    refused(lambda: pipeline.load(copy), path, "misshapen conv_in.weight [31, 4, 3, 3] instead of [32, 4, 3, 3] (1)")
    path.write_bytes(good)
    rewrite(path.parent, path.stem, lambda name, tensor: {name: tensor.int() if name == "conv_in.weight" else tensor})
    refused(lambda: pipeline.load(copy), path, "conv_in.weight of type I32")
    path.write_bytes(good[: len(good) // 2])
    refused(lambda: pipeline.load(copy), path, "not a whole safetensors file")
    path.unlink()
    refused(lambda: pipeline.load(copy), path, "no such file")


def test_values_beyond_half_precision(copy):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    rewrite(
        path.parent,
        path.stem,
        lambda name, tensor: {name: tensor * 1e9 if name == "encoder.conv_in.weight" else tensor},
    )
    refused(lambda: pipeline.load(copy, "float16"), path, "encoder.conv_in.weight holds values beyond float16")
    refused(
        lambda: pipeline.save(pipeline.load(copy), copy, dtype="float16"), "encoder.conv_in.kernel", "beyond float16"
    )
    pipeline.load(copy, "bfloat16")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


MISTAKES = [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
    ("model_index.json", {"unet": ["diffusers", "UNetMotionModel"]}, "UNetMotionModel"),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
    ("model_index.json", {"tokenizer": ["os", "system"]}, "system"),
    ("model_index.json", {"vae": None}, "vae=None"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
    ("unet/config.json", {"made_up": 3}, "made_up"),
    ("unet/config.json", {"block_out_channels": [30, 60]}, "norm_num_groups"),
    ("unet/config.json", {"cross_attention_dim": "wide"}, "cross_attention_dim"),
    ("vae/config.json", {"act_fn": "relu"}, "act_fn"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act"),
    ("text_encoder/config.json", {"vocab_size": 100}, "token_embedding"),
    ("image_encoder/config.json", {"num_channels": 1}, "num_channels"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": "long"}, "model_max_length"),
]


@pytest.mark.parametrize("file, change, word", MISTAKES)
def test_wrong_settings_are_refused_with_file_and_option(copy, file, change, word):
    edit(copy / file, **change)
    refused(lambda: pipeline.load(copy), copy, word)


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
)
def test_missing_and_broken_files(copy, file):
    (copy / file).write_text("{")
    refused(lambda: pipeline.load(copy), copy / file if "vocab" not in file else copy / "tokenizer")
    (copy / file).unlink()
    refused(lambda: pipeline.load(copy), copy / file, "no such file")


def test_weights_that_are_no_pickle_under_its_name_are_refused(copy):
    (copy / "vae" / "diffusion_pytorch_model.safetensors").rename(copy / "vae" / "diffusion_pytorch_model.bin")
    refused(lambda: pipeline.load(copy), "vae/diffusion_pytorch_model.bin", "cannot be read")


def test_nothing_is_written_on_error(folder, copy, monkeypatch):
    before = there(copy)
    sd = pipeline.load(folder)
    refused(lambda: pipeline.save(sd, copy, format="gguf"), "format='gguf'")
    refused(lambda: pipeline.save(sd, copy, dtype="int8"), "dtype='int8'")
    refused(lambda: pipeline.save(sd.add(hooks=lambda: None), copy), "function", "merge")
    odd = sd.networks["unet"].clone(config=UNetConfig(in_channels=6))
    odd = sd.with_networks(unet=odd)
    refused(lambda: pipeline.save(odd, copy), "in_channels=6")

    def fail(sd, folder):
        raise ValueError("late")

    refused(lambda: pipeline.save(sd, copy, extras=[fail]), "late")
    assert there(copy) == before and [path.name for path in copy.parent.iterdir()] == ["model"]
    (copy.parent / "photos").mkdir()
    (copy.parent / "photos" / "a.png").write_text("precious")
    refused(lambda: pipeline.save(sd, copy.parent / "photos"), "photos", "choose a new or empty folder")
    assert (copy.parent / "photos" / "a.png").read_text() == "precious"


KILLED_SAVE = """
import os, signal, sys
from sdjax.convert import pipeline
def die(sd, folder):
    os.kill(os.getpid(), signal.SIGKILL)
pipeline.save(pipeline.load("random:tiny"), sys.argv[1], extras=[die])
"""


def test_kill_during_save_leaves_the_old_folder(copy):
    (copy / "README.md").write_text("mine")
    before = there(copy)
    run = subprocess.run([sys.executable, "-c", KILLED_SAVE, copy], env=os.environ, capture_output=True)
    assert run.returncode == -9 and there(copy) == before
    assert len(list(copy.parent.iterdir())) == 2

    def extra(sd, folder):
        (folder / "e4t").mkdir()
        (folder / "e4t" / "config.json").write_text("{}")

    pipeline.save(pipeline.load(copy), copy, extras=[extra])
    assert there(copy) == {**before, "e4t/config.json": b"{}"} and len(list(copy.parent.iterdir())) == 1


# ---- the command -------------------------------------------------------------------------------


def test_command(folder, tmp_path, capsys):
    assert main([str(folder), str(tmp_path / "half"), "--dtype", "float16", "--shard-size", "0.0001"]) == 0
    assert str(tmp_path / "half") in capsys.readouterr().out
    sd = pipeline.load(tmp_path / "half", None)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(sd.parts["unet"])} == {"float16"}
    assert main([str(folder), str(tmp_path / "same")]) == 0
    assert there(tmp_path / "same") == there(folder)
    capsys.readouterr()
    single = [str(folder), "--format", "single-file"]
    for arguments in (["/none/such"], [*single, "--shard-size", "1"], [*single, "--no-reference"],
                      [str(folder), "--no-reference"], ["random:tiny", "--no-reference"],
                      [str(folder), "--dtype", "int8"], [str(folder), "--format", "gguf"]):  # fmt: skip
        assert main([arguments[0], str(tmp_path / "bad"), *arguments[1:]]) == 1
        output = capsys.readouterr()
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_a_folder_in_float16_loads_plainly_in_diffusers(tmp_path):
    """All of it in float32 where no type is asked for: transformers would take the file's, diffusers does not."""
    pipeline.save(pipeline.load("random:tiny"), tmp_path / "half", dtype="float16")
    for folder in (tmp_path / "half", pipeline.POCKET):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
