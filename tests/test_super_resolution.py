"""LDM-SR against diffusers: its autoencoder with a codebook, its UNet without words, its pictures and its files."""

import dataclasses

import diffusers
import diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution as sr_module
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch_weights import assert_close, fill, from_torch, shapes, to_torch, tree

import sdjax
from sdjax import trees
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.formats.models import infer_config, single_file
from sdjax.formats.storage import ldm_names, parameters
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import AutoencoderKL, VaeConfig
from sdjax.service import programs, records

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own
# Heads of 32 channels, as the original has them, for that no shape tells.
UNET2D = {
    "in_channels": 6, "out_channels": 3, "sample_size": 64, "block_out_channels": (32, 64), "layers_per_block": 1,
    "attention_head_dim": 32, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
VQ = {
    "block_out_channels": (32, 32, 64), "num_vq_embeddings": 50, "sample_size": 256,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip
SCHEDULER = {"beta_start": 0.0015, "beta_end": 0.0155, "beta_schedule": "scaled_linear", "clip_sample": False}
FULL = UNET2D | {
    "block_out_channels": (160, 320, 320, 640), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
}  # fmt: skip


def config_of(model):
    """Returns what stands in the config.json of a model of diffusers."""
    return {"_class_name": type(model).__name__, **model.config}


@pytest.fixture(scope="module")
def pipe():
    """diffusers' pipeline with noise in every weight."""
    vqvae = fill(diffusers.VQModel(**VQ), 1)
    with torch.no_grad():  # as far apart as what the encoder gives
        vqvae.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(2))
    unet = fill(diffusers.UNet2DModel(**UNET2D), 0)
    made = diffusers.LDMSuperResolutionPipeline(vqvae, unet, diffusers.DDIMScheduler(**SCHEDULER))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm-sr") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd(folder):
    return sdjax.load(folder)


def test_the_codebook_is_that_of_diffusers(pipe):
    config = VaeConfig.from_json(config_of(pipe.vqvae))
    assert config.scaling_factor == 1.0  # where the file says 0.18215, which nobody multiplies by
    vae = AutoencoderKL(config)
    params = {"params": tree(pipe.vqvae.state_dict(), parameters.template(vae))}
    x = np.random.default_rng(0).uniform(-1, 1, (2, 24, 32, 3)).astype(np.float32)
    mean, logvar = jax.jit(lambda p: vae.apply(p, x, method="encode"))(params)
    decode = jax.jit(lambda p, z: vae.apply(p, z, method="decode"))
    with torch.no_grad():
        theirs = pipe.vqvae.encode(to_torch(x)).latents
        assert_close(mean, from_torch(theirs))
        assert_close(decode(params, mean), from_torch(pipe.vqvae.decode(theirs).sample))
    assert float(logvar.max()) == -30
    moved = decode(params, mean + 1e-4)  # mostly to the same entries
    assert float(jnp.mean(jnp.abs(moved - decode(params, mean)) < 1e-5)) > 0.5
    assert {"quantize.embedding.weight": (50, 3)}.items() <= shapes(parameters.template(vae)).items()


def test_the_gradient_passes_the_codebook(pipe):
    vae = AutoencoderKL(VaeConfig.from_json(config_of(pipe.vqvae)))
    params = {"params": tree(pipe.vqvae.state_dict(), parameters.template(vae))}
    grad = jax.jit(jax.grad(lambda z, params: vae.apply(params, z, method="decode").sum()))(
        jnp.ones((1, 4, 4, 3)), params
    )
    assert float(jnp.abs(grad).max()) > 0


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_the_unet_without_words_is_that_of_diffusers(pipe, size):
    config = UNetConfig.from_json(config_of(pipe.unet))
    params = tree(pipe.unet.state_dict(), parameters.template(UNet(config)))
    z = np.random.default_rng(1).standard_normal((2, *size, 6), np.float32)
    ours, _ = jax.jit(UNet(config).apply)({"params": params}, z, jnp.array([3, 900]))
    if size == (8, 8):  # diffusers' own cannot make odd sides meet
        with torch.no_grad():
            assert_close(ours, from_torch(pipe.unet(to_torch(z), torch.tensor([3, 900])).sample))
    assert ours.shape == (2, *size, 3)


def test_the_picture_of_diffusers(pipe, sd, monkeypatch):
    given = tiny.pictures(2, 12)
    left = tiny.give(monkeypatch, sr_module, tiny.start_noise([4, 5], (12, 12, 3)))
    theirs = pipe(2 * to_torch(given / np.float32(255)) - 1, num_inference_steps=10, output_type="np").images
    ours = sdjax.super_resolve(sd, list(given), steps=10, seeds=[4, 5])
    assert ours.shape == (2, 48, 48, 3) and not left
    difference = tiny.difference(ours, theirs)
    print(f"PARITY ldm-sr {difference} of 255")
    assert difference <= 1


def test_a_folder_returns_as_it_was(sd, folder, tmp_path):
    assert sd.schedule == Schedule.from_json({**SCHEDULER, "steps_offset": 0, "timestep_spacing": "leading"})
    written = sdjax.save(sd, tmp_path / "again")
    again = diffusers.LDMSuperResolutionPipeline.from_pretrained(written, low_cpu_mem_usage=False)
    for part in ("unet", "vqvae"):
        there = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        here = getattr(again, part).state_dict()
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in there)
    assert again.scheduler.config.steps_offset == 0
    assert sdjax.load(written).networks == sd.networks


def test_old_names_of_attention_in_pickled_files(sd, folder, tmp_path):
    """Folders were written so before diffusers 0.15."""
    sdjax.save(sd, tmp_path / "old")
    renamed = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for part in ("unet", "vqvae"):
        path = tmp_path / "old" / part / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        for new, old in renamed.items():
            state = {name.replace(new, old): value for name, value in state.items()}
        torch.save(state, path.with_suffix(".bin"))
        path.unlink()
    same(sdjax.load(tmp_path / "old"), sd)


def same(ours, theirs):
    assert ours.networks == theirs.networks and not ours.tokenizers
    for part in ("unet", "vae"):
        here, there = trees.flatten(ours.parts[part]), trees.flatten(theirs.parts[part])
        assert here.keys() == there.keys()
        for name in there:
            np.testing.assert_array_equal(here[name], there[name], err_msg=name)


# ---- the original's single file ------------------------------------------------------------------


def test_a_single_file_returns_as_it_was(sd, tmp_path):
    path = sdjax.save(sd, tmp_path / "model.safetensors", "single-file")
    again = sdjax.load(path)
    same(again, sd)
    assert again.schedule == sd.schedule


def test_the_original_file(sd, pipe, tmp_path):
    """Its shapes, its queries, keys and values of one head after the other, and no notes of ours."""
    state = load_file(sdjax.save(sd, tmp_path / "model.safetensors", "single-file"))
    qkv = state["model.diffusion_model.middle_block.1.qkv.weight"]
    assert qkv.shape == (192, 64, 1) and state["model.diffusion_model.middle_block.1.proj_out.weight"].ndim == 3
    own = pipe.unet.mid_block.attentions[0]
    expected = torch.cat([getattr(own, f"to_{name}").weight[32 * i :][:32] for i in range(2) for name in "qkv"])
    assert torch.equal(qkv[..., 0], expected)
    assert state["first_stage_model.quantize.embedding.weight"].shape == (50, 3)
    buffers = {"model_ema.decay": torch.tensor(0.9999), "betas": torch.linspace(0.0015**0.5, 0.0155**0.5, 1000) ** 2}
    torch.save({"state_dict": state | buffers, "global_step": 1}, tmp_path / "model.ckpt")
    again = sdjax.load(tmp_path / "model.ckpt")
    same(again, sd)
    assert (again.schedule.beta_start, again.schedule.beta_end) == (0.0015, 0.0155)


def test_full_size_names_and_sizes():
    """The original's configuration, by diffusers' network without memory and the names of the original code."""
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**FULL)
    config = UNetConfig.from_json(config_of(model))
    assert config.attention_head_dim == (5, 10, 10, 20)
    template = parameters.template(UNet(config))
    assert shapes(template) == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    there = {}
    for name, tensor in parameters.write(template).items():
        place = ldm_names.rename(name, ldm_names.unet_modules(config))
        rows, *others = tensor.shape
        there[place] = (3 * rows, *others, *(1,) * (len(others) == 1)) if ".qkv." in place else tensor.shape
    assert "input_blocks.10.1.qkv.bias" in there and "input_blocks.9.0.op.weight" in there
    assert "output_blocks.2.2.conv.weight" in there and "output_blocks.3.1.norm.weight" not in there
    found = infer_config.unet_config(there)
    assert dataclasses.replace(found, sample_size=64) == config
    assert {f"{single_file.UNET}{name}" for name in there} >= {
        f"{single_file.UNET}{name}" for name in ("middle_block.1.norm.weight", "output_blocks.0.1.proj_out.weight")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vq_embed_dim": 4}, "vq_embed_dim=4: expected None or 3"), ({"norm_type": "spatial"}, "norm_type='spatial'")],
)
def test_autoencoders_that_are_not_covered(change, message):
    with pytest.raises(ValueError, match=message):
        VaeConfig.from_json({"_class_name": "VQModel", **VQ, **change})


def test_what_does_not_fit(sd):
    given = tiny.pictures(1, 12)[0]
    with pytest.raises(ValueError, match="guidance=3.0: LDM-SR reads no words"):
        sdjax.super_resolve(sd, given, guidance=3.0)
    with pytest.raises(ValueError, match="expected LDM-SR"):
        sdjax.super_resolve(sd.with_parts(text_encoder={}), given)
    with pytest.raises(ValueError, match="expected an upscaler"):
        sdjax.upscale(sd, [""], given)


def test_the_program_asks_for_no_words(folder, tmp_path, monkeypatch, capsys):
    Image.fromarray(tiny.pictures(1, 16)[0]).save(tmp_path / "small.png")
    asked = ["--model", str(folder), "--image", str(tmp_path / "small.png"), "--steps", "10", "--out", str(tmp_path)]
    assert programs.main("upscale", "", asked) == 0
    with Image.open(tmp_path / "00000-0.png") as made:
        assert made.size == (64, 64)
    record = records.read(tmp_path / "00000-0.png")
    assert (record["guidance"], record["prompt"], record["noise_level"]) == (1.0, "", None)
    assert programs.main("upscale", "", [*asked, "--prompt", "a cat"]) == 1
    assert "--prompt='a cat': LDM-SR reads no words" in capsys.readouterr().err
