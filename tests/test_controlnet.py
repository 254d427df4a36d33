"""ControlNets: pictures against diffusers' pipelines, files in both namings, and when they act."""

import dataclasses
import json
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from programs import sample

import sdjax
from sdjax import convert
from sdjax.diffusion import wrappers
from sdjax.formats import pipeline
from sdjax.formats.adapters import kinds
from sdjax.formats.models import controlnet
from sdjax.formats.storage import files, ldm_names, parameters
from sdjax.models.cond import Cond, UNetInputs
from sdjax.models.controlnet import ControlNet, ControlNetConfig
from sdjax.models.unet import UNetConfig
from sdjax.sampling import denoising, generate, inpainting, settings, upscaling
from sdjax.sampling.control import Control, applied
from sdjax.sampling.fields import make
from sdjax.service import records
from sdjax.settings import SettingError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own


@pytest.fixture(scope="module")
def sd():
    return tiny.model()


@pytest.fixture(scope="module")
def controls():
    one = sdjax.load_control("random:tiny")
    config = dataclasses.replace(one.network.config, controlnet_conditioning_channel_order="bgr")
    return [
        dataclasses.replace(one, params=tiny.noised(one.params, 7)),
        dataclasses.replace(one, params=tiny.noised(one.params, 8), network=ControlNet(config)),
    ]


@pytest.fixture(scope="module")
def pipe(sd, controls, tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    nets = []
    for i, control in enumerate(controls):
        sdjax.save_control(control, folder / f"{i}")
        nets.append(diffusers.ControlNetModel.from_pretrained(folder / f"{i}", low_cpu_mem_usage=False))
    return tiny.theirs(sd, folder / "model", diffusers.StableDiffusionControlNetPipeline, controlnet=nets), folder


CASES = {
    "one": dict(count=1, weights=[0.8], guess=False),
    "two": dict(count=2, weights=[0.7, 1.2], guess=False, starts=[0.0, 0.3], ends=[0.6, 1.0]),
    "guess": dict(count=1, weights=[1.0], guess=True),
    "guess two": dict(count=2, weights=[0.5, 1.0], guess=True),
    "guess, no guidance": dict(count=1, weights=[1.0], guess=True, guidance=1.0),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "guess two" else ()) for case in CASES]
)
def test_gives_the_picture_of_diffusers(sd, controls, pipe, case):
    case = {"starts": [0.0, 0.0], "ends": [1.0, 1.0], "guidance": 4.0, **CASES[case]}
    count, many, hints = case["count"], pipe[0].controlnet.nets, tiny.pictures(2, seed=1)
    kind = diffusers.StableDiffusionControlNetPipeline
    theirs = kind(**{**pipe[0].components, "controlnet": many[0] if count == 1 else list(many)})
    theirs.set_progress_bar_config(disable=True)
    noise = tiny.start_noise([4, 5])

    def first(values):
        return values[0] if count == 1 else list(values)

    seen = [Image.fromarray(hint) for hint in hints]  # for both prompts
    wanted = theirs(
        tiny.PROMPTS, image=first(seen), num_inference_steps=10, guidance_scale=case["guidance"],
        negative_prompt=tiny.NEGATIVE, controlnet_conditioning_scale=first(case["weights"]), guess_mode=case["guess"],
        control_guidance_start=first(case["starts"]), control_guidance_end=first(case["ends"]), output_type="np",
        latents=torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2).copy()),
    ).images  # fmt: skip
    acting = [
        control.on(hint, weight, start, end, case["guess"])
        for control, hint, weight, start, end in zip(
            controls[:count], hints, case["weights"], case["starts"], case["ends"], strict=False
        )
    ]
    made = sdjax.text2img(
        sd,
        tiny.PROMPTS,
        steps=10,
        guidance=case["guidance"],
        negative_prompt=tiny.NEGATIVE,
        seeds=[4, 5],
        control=acting,
    )
    assert tiny.difference(made, wanted) <= 1
    assert np.abs(made.astype(int) - sdjax.text2img(sd, tiny.PROMPTS, steps=10, seeds=[4, 5])).mean() > 3


def test_the_program_begins_with_pictures_and_masks_and_enlarges(sd, tmp_path, monkeypatch, capsys):
    given, mask = tiny.pictures(2, seed=1)[0], np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    for name, one in (("given", given), ("mask", mask)):
        Image.fromarray(one).save(tmp_path / f"{name}.png")
    base = ["--prompt", "a cat", "--control", "random:tiny", "--control-image", str(tmp_path / "given.png")]
    image, calls = ["--image", str(tmp_path / "given.png")], []

    def stub(name):
        def made(sd, job, *more):
            calls.append((name, more, job))
            return np.full((len(job.pictures), 32, 32, 3), 127, np.uint8)

        return made

    functions = {generate: ("drawn", "redrawn"), inpainting: ("repainted",), upscaling: ("redone",)}
    for module, names in functions.items():
        for name in names:
            monkeypatch.setattr(module, name, stub(name))
    monkeypatch.setattr(pipeline, "load", lambda *source, **given: sd)

    def run(*arguments):
        (path,) = sample("controlnet", tmp_path / "out", *base, *arguments)
        name, more, job = calls[-1]
        assert len(job.control) == 1 and job.control[0].weight == 1.0
        return name, more, job.settings, records.read(path)

    name, more, settings, record = run(*image, "--strength", "0.5")
    assert (name, settings.strength, record["strength"], record["image"]) == ("redrawn", 0.5, 0.5, "given.png")
    np.testing.assert_array_equal(more[0][0], given)
    name, more, settings, record = run(*image, "--mask", str(tmp_path / "mask.png"))
    assert (name, settings.strength, settings.feather, record["mask"]) == ("repainted", 1.0, 4, "mask.png")
    np.testing.assert_array_equal(more[1][0], mask)
    Image.fromarray(np.stack([0 * mask, 0 * mask, 0 * mask, mask], -1)).save(tmp_path / "strokes.png")
    np.testing.assert_array_equal(run(*image, "--mask", str(tmp_path / "strokes.png"))[1][1][0], mask)
    name, _, settings, record = run("--hires", "1.5")
    assert (name, settings.hires, record["hires"], record["hires_strength"]) == ("redone", 1.5, 1.5, 0.7)
    name, _, _, record = run()
    assert name == "drawn" and not {"strength", "feather", "hires_method"} & record.settings.keys()
    for wrong in (["--mask", "m.png"], [*image, "--hires", "2"], ["--weight", "1", "2"], ["--strength", "0.5"]):
        assert sample("controlnet", tmp_path / "out", *base, *wrong) == 1
        flag = [word for word in wrong if word.startswith("--")][-1]
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {flag}=")


def test_files_in_both_namings_hold_the_same(sd, tmp_path):
    """A file with the original names, read by us and by diffusers, with and without the prefix."""
    config = ControlNetConfig.of(sd.networks["unet"].config, 8)  # diffusers reads no other hint encoder from such files
    network = ControlNet(config)
    control = Control(tiny.noised(parameters.random_parameters(network, "float32")), network)
    folder = sdjax.save_control(control, tmp_path / "folder")
    modules = controlnet.modules(config)
    original = {ldm_names.rename(name, modules): tensor for name, tensor in parameters.write(control.params).items()}
    assert {"input_hint_block.0.weight", "zero_convs.0.0.bias", "middle_block_out.0.weight"} <= original.keys()
    for prefix in ("", "control_model."):
        path = tmp_path / f"{prefix}x.safetensors"
        others = {"cond_stage_model.w": original["time_embed.0.bias"]} if prefix else {}
        files.write_safetensors(path, {prefix + name: one for name, one in original.items()} | others, {"format": "pt"})
        again = sdjax.load_control(path)
        assert again.network.config.unet.block_out_channels == config.unet.block_out_channels
        hint = again.network.config.conditioning_embedding_out_channels
        assert hint == config.conditioning_embedding_out_channels
        jax.tree.map(np.testing.assert_array_equal, again.params, control.params)
    tensors = {name: torch.tensor(np.array(one.array())) for name, one in original.items()}
    theirs = convert_controlnet_checkpoint(dict(tensors), json.loads((folder / "config.json").read_text()))
    ours = parameters.write(control.params)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(theirs[name].numpy(), tensor.array())
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    jax.tree.map(np.testing.assert_array_equal, sdjax.load_control(tmp_path / "x.pth").params, control.params)
    assert kinds.opened(tmp_path / "x.pth", sd)[0].name == "controlnet"  # init=
    assert convert.main([str(tmp_path / "x.pth"), str(tmp_path / "y.safetensors")]) == 0
    jax.tree.map(np.testing.assert_array_equal, sdjax.load_control(tmp_path / "y.safetensors").params, control.params)
    jax.tree.map(np.testing.assert_array_equal, sdjax.load_control(folder).params, control.params)


def test_sizes_of_the_published_ones():
    """340 tensors and 361,279,120 numbers, as counted in lllyasviel's control_v11p_sd15_*."""
    config = ControlNetConfig.of(UNetConfig(cross_attention_dim=768), 8)
    shapes = jax.tree.leaves(parameters.template(ControlNet(config)))
    assert (len(shapes), sum(one.size for one in shapes)) == (340, 361_279_120)
    assert ControlNetConfig.from_json(config.to_json()) == config


def test_weights_steps_and_pictures_compile_nothing(sd, controls):
    hints = tiny.pictures(2, seed=1)
    sdjax.text2img(sd, ["a cat"], steps=4, control=controls[0].on(hints[0]))
    before = denoising._sample._cache_size()
    sdjax.text2img(sd, ["a cat"], steps=6, control=controls[0].on(hints[1], weight=0.3, start=0.2, end=0.5))
    assert denoising._sample._cache_size() == before


def test_a_weight_of_zero_is_no_control(sd, controls):
    without = sdjax.text2img(sd, ["a cat"], steps=4)
    hint = tiny.pictures(1, seed=1)[0]
    idle = sdjax.text2img(sd, ["a cat"], steps=4, control=controls[0].on(hint, weight=0.0))
    assert np.abs(without.astype(int) - idle).max() <= 1


def test_steps_in_which_it_acts(controls):
    weights = controls[0].on(None, weight=2.0, start=0.25, end=0.75).weights(8)
    np.testing.assert_array_equal(weights[:9], [0, 0, 2, 2, 2, 2, 0, 0, 0])


def test_pooled_residuals_equal_diffusers(controls):
    """global_pool_conditions: the residuals are means over the picture."""
    config = dataclasses.replace(controls[0].network.config, global_pool_conditions=True)
    theirs = diffusers.ControlNetModel.from_config(json.loads(json.dumps(config.to_json()))).eval()
    state = {name: torch.tensor(np.array(one.array())) for name, one in parameters.write(controls[0].params).items()}
    theirs.load_state_dict(state)
    random = np.random.default_rng(0)
    z, context = random.standard_normal((1, 8, 8, 4), np.float32), random.standard_normal((1, 5, 32), np.float32)
    hint, t = random.random((1, 16, 16, 3), np.float32), np.array([17.0], np.float32)
    maps, middle = ControlNet(config).apply({"params": controls[0].params}, z, t, context, hint)

    def first(x):
        return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())

    with torch.no_grad():
        wanted, last = theirs(first(z), torch.tensor([17.0]), torch.from_numpy(context), first(hint), return_dict=False)
    for ours, one in zip((*maps, middle), (*wanted, last), strict=True):
        np.testing.assert_allclose(ours, one.permute(0, 2, 3, 1), atol=2e-5)


def test_control_modes_are_those_of_each_unit(controls):
    """As in A1111's extension: both others weaken fine maps, and only the last leaves out the negative side."""
    made = make(settings.ControlNet, dict(prompt="a", control=("a", "b", "c"), control_image=("d",) * 3,
                                         control_mode=["Balanced", "My prompt is more important", 2]))  # fmt: skip
    acting = applied([controls[0]] * 3, made, tiny.pictures(3))
    assert [(one.guess, one.soft) for one in acting] == [(False, False), (False, True), (True, False)]
    old = records.from_json('{"class": "Request", "task": "controlnet", "settings": {"guess": true}}')
    assert old.settings == {"control_mode": ("control",)}
    written = records.text(records.of(made))
    assert records.parse(written).settings["control_mode"] == made.control_mode
    with pytest.raises(SettingError, match="control_mode=.*one, or 2"):
        make(
            settings.ControlNet,
            dict(prompt="a", control=("a", "b"), control_image=("d",) * 2, control_mode=["prompt"] * 3),
        )


def test_a_soft_control_acts_less_on_fine_maps_of_all_rows(controls, monkeypatch):
    seen = []
    whole = wrappers.ControlNet(controls[0].params, "control", controls[0].network)
    cond = Cond(UNetInputs(jnp.ones((2, 5, 32)))).with_own(control={"hint": jnp.ones((2, 16, 16, 3))})
    sd = types.SimpleNamespace(hooks=())
    z, t = jnp.ones((2, 8, 8, 4)), jnp.ones(2)
    monkeypatch.setattr(
        wrappers.hooks, "apply", lambda *_, **__: ([jnp.ones((2, 8, 8, 4))] * 3, jnp.ones((2, 2, 2, 4)))
    )
    for one in (whole, whole.replace(soft=True)):
        one(sd, lambda z, t, cond: seen.append(cond.unet.residuals), z, t, cond)
    maps, middle = seen[1]
    np.testing.assert_allclose([float(one[0, 0, 0, 0]) for one in (*maps, middle)], wrappers.guess_scales(4))
    assert all((one == 1).all() for one in (*seen[0][0], seen[0][1])) and (maps[0][0] == maps[0][1]).all()


def test_guess_scales_are_those_of_torch():
    np.testing.assert_allclose(wrappers.guess_scales(13), torch.logspace(-1, 0, 13), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda control: control, "a ControlNet without a picture"),
        (lambda control: control.on(tiny.pictures(1)[0], start=0.5, end=0.5), "start=0.5, end=0.5"),
        (lambda control: sdjax.load_control("random:sd9"), "random:sd15"),
        (lambda control: sdjax.load_control("no/such/one/here"), "no/such"),
    ],
)
def test_what_does_not_fit(sd, controls, make, message):
    with pytest.raises(ValueError, match=message):
        sdjax.text2img(sd, ["a cat"], control=make(controls[0]))
