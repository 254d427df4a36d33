"""Single-file checkpoints against diffusers' own loader and converters: the same names and values, both ways."""

import ast
import dataclasses
import json
import pathlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_weights
import transformers
from diffusers.loaders import single_file_utils as converters
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdjax import trees
from sdjax.convert import main
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.formats import pipeline
from sdjax.formats.models import infer_config, presets, single_file
from sdjax.formats.storage import files, ldm_names, parameters
from sdjax.models.clip import TextConfig, TextEncoder
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import AutoencoderKL, VaeConfig
from sdjax.text.tokenizer import Tokenizer

TEXTS = ["a photo of a woman on the beach!", "a sketch of a man in the snow"]
DATA = pathlib.Path(__file__).parent / "data"
UNET, VAE, CLIP, OPEN_CLIP = (single_file.UNET, single_file.VAE, single_file.CLIP_PREFIX, single_file.OPEN_CLIP_PREFIX)
SMALL = {"cross_attention_dim": 64, "sample_size": 64, "layers_per_block": 1, "attention_head_dim": 8}
SMALL |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
SMALL |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (32, 64)}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "max_position_embeddings": 16}
TEXT |= {"num_hidden_layers": 2, "hidden_act": "quick_gelu", "projection_dim": 64}
TWO = {"use_linear_projection": True, "attention_head_dim": (1, 1), "upcast_attention": True}
UPSCALING = {"use_linear_projection": True, "in_channels": 7, "num_class_embeds": 1000, "sample_size": 128}
UPSCALING |= {"only_cross_attention": (True, False)}
KINDS = {
    "sd1": (SMALL | {"layers_per_block": 2}, TEXT),
    "inpaint": (SMALL | {"in_channels": 9}, TEXT),
    "sd2": (SMALL | TWO, TEXT | {"hidden_act": "gelu", "num_hidden_layers": 23}),
    "upscaler": (SMALL | UPSCALING, TEXT | {"hidden_act": "gelu", "num_hidden_layers": 23}),
}


PIPELINES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "inpaint": diffusers.StableDiffusionInpaintPipeline,
    "sd2": diffusers.StableDiffusionPipeline,
    "upscaler": diffusers.StableDiffusionUpscalePipeline,
}


def pipeline_of(kind, folder):
    """Writes a small random pipeline of diffusers, every weight filled with noise, and returns it."""
    unet, text = KINDS[kind]
    Tokenizer.train(TEXTS, 560, length=16).save(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    pad = tokenizer.convert_tokens_to_ids("!") if kind in ("sd2", "upscaler") else tokenizer.eos_token_id
    text |= {"vocab_size": 560, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vae = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    parts = {
        "unet": diffusers.UNet2DConditionModel(**unet),
        "vae": diffusers.AutoencoderKL(**vae, block_out_channels=(32, 64), sample_size=2 * unet["sample_size"]),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text, pad_token_id=pad)),
    }
    if kind == "upscaler":
        parts["vae"].register_to_config(scaling_factor=0.08333)
    for i, module in enumerate(parts.values()):
        torch_weights.fill(module, i)
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler |= {"prediction_type": "v_prediction" if kind in ("sd2", "upscaler") else "epsilon"}
    if kind == "upscaler":
        scheduler |= {"beta_start": 0.0001, "beta_end": 0.02}
        parts["low_res_scheduler"] = diffusers.DDPMScheduler(beta_start=0.0001, beta_end=0.02)
    others = {"safety_checker": None, "feature_extractor": None}
    others |= {"watermarker": None} if kind == "upscaler" else {"requires_safety_checker": False}
    theirs = PIPELINES[kind](**parts, tokenizer=tokenizer, scheduler=diffusers.DDIMScheduler(**scheduler), **others)
    theirs.save_pretrained(folder / "model")
    return theirs


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """(kind, diffusers' pipeline, its folder, the single file that we made of it)"""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = pipeline_of(request.param, folder)
    path = pipeline.save(pipeline.load(folder / "model"), folder / "model.safetensors", "single-file")
    return request.param, theirs, folder / "model", path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(a model of ours with widths that no Stable Diffusion has, its single file)"""
    sd = pipeline.load("random:tiny")
    return sd, pipeline.save(sd, tmp_path_factory.mktemp("tiny") / "tiny.safetensors", "single-file")


def state_of(path):
    """Returns ({name: tensor}, metadata) of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def foreign(path, target, change=lambda state: state, metadata=None):
    """Writes a file as others do: without our notes.  Returns the target."""
    save_file(change(state_of(path)[0]), target, metadata or {"format": "pt"})
    return target


def equal(ours, theirs):
    ours, theirs = trees.flatten(ours), trees.flatten(theirs)
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert ours[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


def same_model(ours, theirs):
    for part in ("unet", "vae", "text_encoder"):
        equal(ours.parts[part], theirs.parts[part])
        assert ours.networks[part] == theirs.networks[part]


def refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# ---- against diffusers -------------------------------------------------------------------------


def test_diffusers_loads_what_we_wrote(saved):
    kind, theirs, folder, path = saved
    options = {"local_files_only": True, "safety_checker": None}
    again = type(theirs).from_single_file(path, config=str(folder), **options)
    for part in ("unet", "vae", "text_encoder"):
        there, here = getattr(theirs, part).state_dict(), getattr(again, part).state_dict()
        assert there.keys() == here.keys()
        for name, tensor in there.items():
            assert torch.equal(here[name], tensor), name
    # What diffusers reads either way, the original code has as 1x1 convolutions.
    state, _ = state_of(path)
    assert state[f"{VAE}encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert state[f"{UNET}input_blocks.1.1.proj_in.weight"].ndim == (4 if kind in ("sd1", "inpaint") else 2)


def test_what_others_wrote_comes_with_its_sizes(saved, tmp_path):
    """The folder that diffusers wrote is the judge: weights bit for bit, and every option of the configs."""
    kind, _, folder, path = saved
    judge = pipeline.load(folder)
    asked = {"prediction_type": "v_prediction"} if kind == "sd2" else {}
    ours = pipeline.load(foreign(path, tmp_path / "other"), tokenizer=folder / "tokenizer", **asked)
    if kind == "sd2":  # 768 pixels, which nothing in the folder's sizes says
        larger = UNet(dataclasses.replace(judge.networks["unet"].config, sample_size=96))
        judge = judge.with_networks(unet=larger)
    same_model(ours, judge)
    assert ours.schedule == dataclasses.replace(judge.schedule, timestep_spacing=None)  # a sampler's, not a model's
    assert ours.tokenizers["text_encoder"].pad == judge.networks["text_encoder"].config.pad_token_id


def test_our_notes_bring_back_any_model(tiny, saved):
    """Heads, groups, tokenizer and schedule of models whose shapes do not tell them."""
    for sd, path in (tiny, (pipeline.load(saved[2]), saved[3])):
        ours = pipeline.load(path)
        same_model(ours, sd)
        assert ours.schedule == sd.schedule and ours.low_schedule == sd.low_schedule
        np.testing.assert_array_equal(*(each.tokenize(TEXTS)["text_encoder"] for each in (ours, sd)))


# ---- full size ---------------------------------------------------------------------------------


def table(name):
    """Returns {name: shape} of a key table of Stable Diffusion 1.5."""
    lines = (line.split(" ", 1) for line in (DATA / name).read_text().splitlines() if line)
    return {name: ast.literal_eval(shape) for name, shape in lines}


def empty(sizes, prefix, modules):
    """Returns a checkpoint of empty tensors with LDM's names."""
    return {
        prefix + ldm_names.rename(name, modules): torch.empty(shape, device="meta") for name, shape in sizes.items()
    }


def sizes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_names_of_sd15_go_to_ldm_and_back():
    unet, vae = table("unet_keys.txt"), table("vae_keys.txt")
    there = empty(unet, UNET, ldm_names.unet_modules(UNetConfig(**presets.SHAPES["sd15"]["unet"])))
    assert len(there) == 686
    assert sizes_of(converters.convert_ldm_unet_checkpoint(there, {"layers_per_block": 2})) == unet
    blocks = {"down_block_types": (None,) * 4, "up_block_types": (None,) * 4}
    there = empty(vae, VAE, ldm_names.vae_modules(VaeConfig(**presets.SHAPES["sd15"]["vae"])))
    assert len(there) == 248
    assert sizes_of(converters.convert_ldm_vae_checkpoint(there, blocks)) == vae


@pytest.mark.parametrize(("part", "prefix", "file"), [("unet", UNET, "unet_keys.txt"), ("vae", VAE, "vae_keys.txt")])
def test_our_reader_finds_all_names_of_sd15(part, prefix, file):
    """Back by our own way: sizes from shapes, and from them the place of every weight."""
    given = {"unet": UNetConfig, "vae": VaeConfig}[part](**presets.SHAPES["sd15"][part])
    modules = {"unet": ldm_names.unet_modules, "vae": ldm_names.vae_modules}[part](given)
    there = {ldm_names.rename(name, modules): shape for name, shape in table(file).items()}
    unet = UNetConfig(**presets.SHAPES["sd15"]["unet"])
    config = infer_config.unet_config(there) if part == "unet" else infer_config.vae_config(there, unet)
    assert config == given
    network = {"unet": UNet, "vae": AutoencoderKL}[part](config)
    view = single_file._view(Sizes({prefix + name: shape for name, shape in there.items()}), network, prefix)
    matrices = {name: view.shape(name) for name in view.names}
    assert matrices == table(file)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Weights of which there are only the shapes."""

    shapes: dict
    path: str = "sizes"

    @property
    def names(self):
        return self.shapes.keys()

    def shape(self, name):
        return self.shapes[name]


def test_names_that_everyone_knows():
    unet = ldm_names.unet_modules(UNetConfig(**presets.SHAPES["sd15"]["unet"]))
    known = {
        "down_blocks.0.downsamplers.0.conv.bias": "input_blocks.3.0.op.bias",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "mid_block.resnets.1.time_emb_proj.bias": "middle_block.2.emb_layers.1.bias",
    }
    assert {name: ldm_names.rename(name, unet) for name in known} == known
    vae = ldm_names.vae_modules(VaeConfig(**presets.SHAPES["sd15"]["vae"]))
    known = {
        "decoder.up_blocks.0.upsamplers.0.conv.weight": "decoder.up.3.upsample.conv.weight",
        "decoder.up_blocks.3.resnets.2.norm1.weight": "decoder.up.0.block.2.norm1.weight",
        "decoder.mid_block.attentions.0.to_out.0.weight": "decoder.mid.attn_1.proj_out.weight",
        "encoder.conv_norm_out.bias": "encoder.norm_out.bias",
    }
    assert {name: ldm_names.rename(name, vae) for name in known} == known
    assert single_file.averaged(f"{UNET}input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


FULL = {
    "sd21": presets.SHAPES["sd21"]["unet"] | {"sample_size": 64},
    "inpaint": presets.SHAPES["sd15-inpainting"]["unet"],
    "depth": presets.SHAPES["sd21"]["unet"] | {"sample_size": 64, "in_channels": 5},
    "upscaler": presets.SHAPES["x4"]["unet"],
}


@pytest.mark.parametrize("kind", FULL)
def test_full_sizes_of_the_family(kind):
    """diffusers' networks without memory: names to LDM, back through diffusers' converter, and sizes from shapes."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**FULL[kind])
    config = UNetConfig(**FULL[kind])
    there = empty(sizes_of(unet.state_dict()), UNET, ldm_names.unet_modules(config))
    back = converters.convert_ldm_unet_checkpoint(there, unet.config)
    assert sizes_of(back) == sizes_of(unet.state_dict())
    found = infer_config.unet_config({name.removeprefix(UNET): shape for name, shape in sizes_of(there).items()})
    if kind == "upscaler":  # the first level has no attention to look at the text alone
        found = dataclasses.replace(found, only_cross_attention=(True, *found.only_cross_attention[1:]))
    assert found == config


def test_full_size_of_the_text_encoders():
    """OpenCLIP's 24 layers become 23; OpenAI's 12 stay."""
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
    options = presets.SHAPES["sd21"]["text_encoder"] | {"projection_dim": 1024} | ids
    two = TextConfig(**options)
    ours = parameters.write(parameters.template(TextEncoder(two)))
    there = single_file._renamed(ours, TextEncoder(two), OPEN_CLIP)
    assert len(there) == 24 * 12 + 5 and there[f"{OPEN_CLIP}text_projection"].shape == (1024, 1024)
    found = {name.removeprefix(OPEN_CLIP): tensor.shape for name, tensor in there.items()}
    assert found["transformer.resblocks.23.attn.in_proj_weight"] == (3072, 1024)
    assert infer_config.open_clip_config(found, ids) == two
    left = {name: shape for name, shape in found.items() if "resblocks.23." not in name}
    assert infer_config.open_clip_config(left, ids) == two
    one = TextConfig(**presets.SHAPES["sd15"]["text_encoder"], **ids)
    found = {name: tensor.shape for name, tensor in parameters.write(parameters.template(TextEncoder(one))).items()}
    assert infer_config.clip_config(found, ids) == one


# ---- what files in the wild hold ---------------------------------------------------------------


def lightning(state, tmp_path, **more):
    """Writes a .ckpt as pytorch-lightning does, and returns its path."""
    torch.save({"epoch": 3, "state_dict": state, "callbacks": {}, "lr_schedulers": [], **more}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


@pytest.mark.parametrize("archive", [True, False])
def test_pickled_checkpoints(saved, tmp_path, archive):
    kind, _, folder, path = saved
    torch.save({"state_dict": state_of(path)[0]}, tmp_path / "a", _use_new_zipfile_serialization=archive)
    read = pipeline.load(tmp_path / "a", tokenizer=folder / "tokenizer", prediction_type="epsilon")
    same = pipeline.load(foreign(path, tmp_path / "b"), tokenizer=folder / "tokenizer", prediction_type="epsilon")
    same_model(read, same)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(folder of a Stable Diffusion 1, its single file)"""
    folder = tmp_path_factory.mktemp("one")
    pipeline_of("sd1", folder)
    return folder / "model", pipeline.save(pipeline.load(folder / "model"), folder / "m.safetensors", "single-file")


def test_entries_that_are_no_weights(one, tmp_path):
    folder, path = one
    state, _ = state_of(path)
    buffers = {
        "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).float() ** 2,
        "alphas_cumprod": torch.ones(1000),
        "logvar": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
        f"{VAE}loss.logvar": torch.zeros(()),
        f"{CLIP}text_model.embeddings.position_ids": torch.arange(16)[None].half(),
        "low_scale_model.betas": torch.ones(3),
        "depth_model.model.weight": torch.ones(3),
    }
    plain = pipeline.load(lightning(state | buffers, tmp_path), tokenizer=folder / "tokenizer")
    same_model(plain, pipeline.load(folder))
    assert plain.schedule == Schedule()


def test_old_names_of_the_text_encoder(one, tmp_path):
    folder, path = one

    def old(state):
        return {name.replace(f"{CLIP}text_model.", CLIP): tensor for name, tensor in state.items()}

    ours = pipeline.load(foreign(path, tmp_path / "old.safetensors", old), tokenizer=folder / "tokenizer")
    same_model(ours, pipeline.load(folder))


def test_averaged_weights_on_demand(one, tmp_path):
    folder, path = one
    state, _ = state_of(path)
    averages = {single_file.averaged(name): tensor + 1 for name, tensor in state.items() if name.startswith(UNET)}
    averages["model_ema.decay"] = torch.tensor(0.9999)
    # diffusers' own converter is the judge of the names.
    judge = converters.convert_ldm_unet_checkpoint(state | averages, {"layers_per_block": 2}, extract_ema=True)
    file = lightning(state | averages, tmp_path)
    raw, averaged = (pipeline.load(file, tokenizer=folder / "tokenizer", ema=ema) for ema in (False, True))
    same_model(raw, pipeline.load(folder))
    equal(averaged.parts["unet"], torch_weights.tree(judge, parameters.template(raw.networks["unet"])))
    equal(averaged.parts["vae"], raw.parts["vae"])
    refused(lambda: pipeline.load(path, ema=True), str(path), "model_ema.")


def test_half_precision(one, tmp_path):
    folder, path = one
    half = pipeline.save(pipeline.load(folder), tmp_path / "half.safetensors", "single-file", dtype="float16")
    assert {tensor.dtype for tensor in state_of(half)[0].values()} == {torch.float16}
    assert trees.flatten(pipeline.load(half, None).parts["unet"])["conv_in.kernel"].dtype == jnp.float16
    state = {name: tensor.bfloat16() for name, tensor in state_of(path)[0].items()}
    ours = pipeline.load(lightning(state, tmp_path), None, tokenizer=folder / "tokenizer")
    kernel = trees.flatten(ours.parts["unet"])["conv_in.kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        kernel,
        jnp.asarray(state[f"{UNET}input_blocks.0.0.weight"].float().numpy().transpose(2, 3, 1, 0)).astype(jnp.bfloat16),
    )


# ---- what the network predicts -----------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder of a Stable Diffusion 2, its weights)"""
    folder = tmp_path_factory.mktemp("two")
    pipeline_of("sd2", folder)
    path = pipeline.save(pipeline.load(folder / "model"), folder / "m.safetensors", "single-file")
    return folder / "model", state_of(path)[0]


def bent(state, bias):
    """Returns the weights with a UNet that gives `bias` whatever comes in."""
    last = {f"{UNET}out.2.weight": torch.zeros_like, f"{UNET}out.2.bias": lambda b: torch.full_like(b, bias)}
    return state | {name: change(state[name]) for name, change in last.items()}


@pytest.mark.parametrize(
    ("metadata", "more", "steps", "bias", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, {}, None, 0.5, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, {}, None, -3.0, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, None, 0.5, "v_prediction"),
        ({}, {"v_pred": torch.zeros(0)}, None, 0.5, "v_prediction"),
        ({}, {}, 875000, -3.0, "epsilon"),
        ({}, {}, 140000, -3.0, "v_prediction"),
        ({}, {}, None, 0.5, "epsilon"),
    ],
)
def test_prediction_of_sd2(two, tmp_path, metadata, more, steps, bias, expected):
    """By what the file says; where it says nothing, by what the network makes of noise."""
    folder, state = two
    state = bent(state, bias) | more
    if metadata:
        save_file(state, tmp_path / "m.safetensors", metadata)
    else:
        lightning(state, tmp_path, global_step=steps)
    path = next(tmp_path.iterdir())
    ours = pipeline.load(path, tokenizer=folder / "tokenizer")
    assert ours.schedule.prediction_type == expected
    assert ours.networks["unet"].config.sample_size == (96 if expected == "v_prediction" else 64)
    asked = pipeline.load(path, tokenizer=folder / "tokenizer", prediction_type="sample")
    assert asked.schedule.prediction_type == "sample"


def test_prediction_of_the_others(one, tiny, tmp_path):
    folder, path = one
    ours = pipeline.load(foreign(path, tmp_path / "m.safetensors"), tokenizer=folder / "tokenizer")
    assert ours.schedule.prediction_type == "epsilon"
    sd, path = tiny
    sd = sd.replace(schedule=dataclasses.replace(sd.schedule, prediction_type="v_prediction"))
    path = pipeline.save(sd, tmp_path / "v.safetensors", "single-file")
    assert pipeline.load(path).schedule == sd.schedule
    assert pipeline.load(path, prediction_type="epsilon").schedule.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(),
        Schedule(beta_start=0.0001, beta_end=0.02),
        Schedule(beta_start=0.0015, beta_end=0.0155),
        Schedule(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        Schedule(num_train_timesteps=100),
        Schedule(beta_schedule="squaredcos_cap_v2"),
    ],
)
def test_schedules_from_buffers(schedule):
    """float32 betas, as the original code registers them."""
    alphas = schedule.alphas_cumprod
    betas = (1 - alphas / np.concatenate([[1.0], alphas[:-1]])).astype(np.float32)
    weights = files.Arrays(pathlib.Path("m"), {"betas": betas})
    found = single_file._schedule(weights, {}, UNetConfig())
    np.testing.assert_allclose(found.alphas_cumprod, alphas, rtol=1e-4)
    if schedule == Schedule():
        assert found == schedule


# ---- files that do not fit, and the command ----------------------------------------------------


def test_what_is_missing_or_wrong_is_named(one, tmp_path):
    folder, path = one
    words = {"tokenizer": folder / "tokenizer"}

    def load(change, name="m.safetensors"):
        return lambda: pipeline.load(foreign(path, tmp_path / name, change), **words)

    without = f"{UNET}input_blocks.1.0.in_layers.2.bias"
    refused(load(lambda state: {k: v for k, v in state.items() if k != without}), "down_blocks.0.resnets.0.conv1.bias")
    refused(load(lambda state: state | {f"{UNET}more.weight": torch.ones(1)}), "unexpected", f"{UNET}more.weight")
    refused(load(lambda state: state | {f"{UNET}out.2.bias": torch.ones(5)}), "misshapen", "conv_out.bias")
    refused(load(lambda state: {k: v for k, v in state.items() if not k.startswith(VAE)}), "m.safetensors", VAE)
    refused(load(lambda state: {"emb_params": torch.ones(1, 64)}), UNET)
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused(lambda: pipeline.load(tmp_path / "list.ckpt", **words), "list.ckpt", "no weights")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    refused(lambda: pipeline.load(tmp_path / "cut.safetensors", **words), "cut.safetensors")
    for notes in ("{", "[1]", '{"unet": 3}', "[" * 10**5):
        file = foreign(path, tmp_path / "notes.safetensors", metadata={"sdjax": notes})
        refused(lambda file=file: pipeline.load(file, **words), "notes.safetensors", "sdjax")


def test_options_of_single_files_elsewhere(one, tmp_path):
    folder, path = one
    refused(lambda: pipeline.load(folder, ema=True), "ema=True", "single file")
    refused(lambda: pipeline.load(path, prediction_type="noise"), str(path), "noise", "epsilon")
    sd = pipeline.load(path)
    refused(lambda: pipeline.save(sd, tmp_path / "model.ckpt", "single-file"), "model.ckpt", ".safetensors")
    refused(lambda: pipeline.save(sd, tmp_path, "single-file"), ".safetensors")


def test_a_vocabulary_is_asked_for(one, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    path = foreign(one[1], tmp_path / "m.safetensors")
    refused(lambda: pipeline.load(path), str(path), "tokenizer: ", single_file.VOCABULARY)


def test_words_beside_clips_vocabulary(tiny, tmp_path, monkeypatch):
    """Other tools refuse a longer token table; a vocabulary of our own travels with the file, words included."""
    sd, _ = tiny
    monkeypatch.setattr(single_file, "LANDMARKS", {})
    metadata = state_of(pipeline.save(sd, tmp_path / "usual.safetensors", "single-file"))[1]
    assert "tokenizer" not in json.loads(metadata["sdjax"])
    worded = sd.replace(words={"<me>": {"text_encoder": jnp.array([1])}})
    refused(lambda: pipeline.save(worded, tmp_path / "words.safetensors", "single-file"), "<me>")


def test_words_go_into_embeddings_beside_the_file(tiny, tmp_path, monkeypatch, capsys):
    """As a subject that E4T was tuned on reaches A1111: the model as one file, its word as another."""
    monkeypatch.setattr(single_file, "LANDMARKS", {})
    sd, _ = tiny
    rows = np.random.default_rng(0).normal(size=(2, sd.networks["text_encoder"].config.hidden_size)).astype(np.float32)
    worded = sd.add_word("*s", 1).add_word("<s>", 2).add_word("*_*", 1)
    worded = worded.with_rows(worded.words["<s>"], {"text_encoder": jnp.asarray(rows)})
    pipeline.save(worded, tmp_path / "model")
    assert main([str(tmp_path / "model"), str(tmp_path / "cat.safetensors")]) == 0
    names_there = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names_there == ["cat-_.safetensors", "cat-s-1.safetensors", "cat-s.safetensors", "cat.safetensors"]
    table = single_file.CLIP_PREFIX + "text_model.embeddings.token_embedding.weight"
    assert len(state_of(tmp_path / "cat.safetensors")[0][table]) == sd.tokenizers["text_encoder"].size
    assert np.array_equal(state_of(tmp_path / "cat-s-1.safetensors")[0]["<s>"], rows)


def test_metadata_for_other_tools():
    sd = pipeline.load("random:tiny")
    unet = dataclasses.replace(sd.networks["unet"].config, cross_attention_dim=1024, sample_size=96)
    schedule = dataclasses.replace(sd.schedule, prediction_type="v_prediction")
    metadata = single_file._modelspec(sd.with_networks(unet=UNet(unet)).replace(schedule=schedule), "cat")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert metadata["modelspec.prediction_type"] == "v" and metadata["modelspec.title"] == "cat"
    assert single_file._modelspec(sd, "cat") == {}


def test_the_command_converts_both_ways(one, tmp_path, capsys):
    folder, path = one
    assert main([str(folder), str(tmp_path / "a.safetensors")]) == 0
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "b")]) == 0
    same_model(pipeline.load(tmp_path / "b"), pipeline.load(folder))
    file = lightning(state_of(path)[0], tmp_path)
    words = ["--tokenizer", str(folder / "tokenizer")]
    assert main([str(file), str(tmp_path / "c"), "--format", "diffusers", *words, "--dtype", "float16"]) == 0
    assert (
        load_file(tmp_path / "c" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"].dtype
        == torch.float16
    )
    assert main([str(file), str(tmp_path / "d"), *words, "--ema"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_autoencoder_of_its_own(one, tmp_path):
    """With the original names, with and without the prefix, pickled, and as folders; into a model that has another."""
    folder, path = one
    wanted = pipeline.load(folder)
    state = {name: tensor for name, tensor in state_of(path)[0].items() if name.startswith(VAE)}
    bare = {name.removeprefix(VAE): tensor for name, tensor in state.items()}
    torch.save(
        {"state_dict": bare | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}}, tmp_path / "a.pt"
    )
    save_file(state, tmp_path / "b.safetensors")
    other = wanted.with_parts(vae=jax.tree.map(lambda x: x + 1, wanted.parts["vae"]))
    model = pipeline.save(other, tmp_path / "other")
    for source in (tmp_path / "a.pt", tmp_path / "b.safetensors", path, folder, folder / "vae"):
        equal(pipeline.load(model, vae=source).parts["vae"], wanted.parts["vae"])
    save_file({"x": torch.zeros(2)}, tmp_path / "none.safetensors")
    refused(lambda: pipeline.load(model, vae=tmp_path / "none.safetensors"), "vae=", "no autoencoder")
    refused(lambda: pipeline.load(model, vae=tmp_path / "missing"), "vae=", "missing", "no such folder")
    del bare["decoder.norm_out.weight"]
    save_file(bare, tmp_path / "part.safetensors")
    refused(lambda: pipeline.load(model, vae=tmp_path / "part.safetensors"), "vae=", "norm_out")
