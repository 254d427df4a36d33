"""ControlNets and tasks while they train: gradients against PyTorch, exports in diffusers, what a run leaves."""

import dataclasses
import json
import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import sdjax
import sdjax.settings
from sdjax import tasks, trees
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.diffusion import noise_schedule, wrappers
from sdjax.formats.models import controlnet
from sdjax.formats.storage import parameters
from sdjax.methods.chain import Chain
from sdjax.methods.controlnet import ControlNet
from sdjax.methods.full import Full
from sdjax.sampling import control, memory
from sdjax.tasks.inpainting import hole
from sdjax.training import begin, checks
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import default_loss

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own
COUNT = 3


def rows(sd, hint=False):
    random = np.random.default_rng(0)
    batch = {
        "pixels": jnp.asarray(random.uniform(-1, 1, (COUNT, 32, 32, 3)), jnp.float32),
        "ids": sd.tokenize(["a face", "", "a cat in the snow"]),
        "index": jnp.arange(COUNT, dtype=jnp.int32),
    }
    shown = {"hint": jnp.asarray(random.random((COUNT, 32, 32, 3)), jnp.float32)}
    return {**batch, "control": shown} if hint else batch


def first(x):
    """Returns channels-last numbers as a PyTorch tensor, channels first."""
    return torch.from_numpy(np.array(x, np.float32).transpose(0, 3, 1, 2).copy())


def draw(keys, shape):
    """Returns a standard normal array for each key."""
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


def drawn(sd, batch, seed):
    """Returns what the loss draws for a batch: (noise of the latents, times, noise)."""
    k_latent, k_time, k_noise, _ = jax.random.split(jax.random.key(seed), 4)
    keys = [trees.example_keys(k, batch["index"]) for k in (k_latent, k_time, k_noise)]
    shape = (16, 16, 4)
    t = jax.vmap(lambda k: jax.random.randint(k, (), 0, 1000))(keys[1])
    return draw(keys[0], shape), t, draw(keys[2], shape)


def encoded(pipe, pixels, noise):
    """Returns scaled latents of pixels by diffusers' autoencoder, channels first."""
    found = pipe.vae.encode(first(pixels)).latent_dist
    return pipe.vae.config.scaling_factor * (found.mean + found.std * first(noise))


def noised(schedule, x, noise, t):
    """Returns sqrt(ac) x + sqrt(1 - ac) noise of a schedule in diffusers."""
    theirs = diffusers.DDPMScheduler.from_config(json.loads(json.dumps(schedule.to_json())))
    return theirs.add_noise(x, noise, torch.from_numpy(np.array(t)).long())


def their_loss(sd, pipe, batch, seed, extra=None, labels=None, residuals=None):
    """Returns the mean squared error of diffusers' UNet, for the noise and times that our loss draws."""
    latent_noise, t, noise = drawn(sd, batch, seed)
    with torch.no_grad():
        z = encoded(pipe, batch["pixels"], latent_noise)
        context = pipe.text_encoder(torch.from_numpy(np.array(batch["ids"]["text_encoder"])).long())[0]
    z_t, times = noised(sd.schedule, z, first(noise), t), torch.from_numpy(np.array(t)).long()
    more = {} if residuals is None else residuals(z_t, times, context)
    seen = z_t if extra is None else torch.cat([z_t, extra], 1)
    predicted = pipe.unet(seen, times, context, class_labels=labels, **more).sample
    target = first(noise)
    if sd.schedule.prediction_type == "v_prediction":
        ac = torch.from_numpy(np.array(sd.schedule.alphas_cumprod))[times].float().reshape(-1, 1, 1, 1)
        target = ac.sqrt() * target - (1 - ac).sqrt() * z
    return ((predicted - target) ** 2).mean()


def assert_alike(grads, module):
    """Asserts that gradients, a tree of ours, are those of a PyTorch module to 1e-4."""
    ours = {name: one.array() for name, one in parameters.write(grads).items()}
    theirs = {name: weight.grad.numpy() for name, weight in module.named_parameters() if weight.grad is not None}
    assert set(ours) == set(theirs) and all(np.abs(value).max() > 0 for value in ours.values())
    whole = [np.concatenate([tree[name].ravel() for name in sorted(ours)]) for tree in (ours, theirs)]
    assert np.linalg.norm(whole[0] - whole[1]) <= 1e-4 * np.linalg.norm(whole[1])
    worst = max(np.linalg.norm(ours[n] - theirs[n]) / (np.linalg.norm(theirs[n]) + 1e-3 * np.linalg.norm(whole[1]))
                for n in ours)  # fmt: skip
    assert worst <= 1e-4


def ours(method, trained, frozen, batch, seed, task):
    """Returns our (loss, gradients) of a batch."""
    loss = default_loss(method, Train(method=method), task)
    key = jax.random.key(seed)
    value = lambda tree, frozen, batch: loss(frozen, tree, batch, key, jnp.int32(0))[0]  # noqa: E731
    return jax.jit(jax.value_and_grad(value))(trained, frozen, batch)


def task_keys(batch, seed):
    """Returns the two keys of every example that a task draws from."""
    keys = jax.random.split(trees.named_key(jax.random.key(seed), "task"))
    return [trees.example_keys(k, batch["index"]) for k in keys]


@pytest.fixture(scope="module")
def plain():
    return tiny.model()


@pytest.fixture(scope="module")
def nine():
    return tiny.model(in_channels=9)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("text2img", marks=pytest.mark.slow), "inpainting"])
def test_controlnet_has_the_gradients_of_diffusers(kind, plain, nine, tmp_path):
    sd = plain if kind == "text2img" else nine
    task, method, seed = tasks.of(sd), ControlNet(), 5
    assert task.name == kind
    trained, frozen = method.split(sd, jax.random.key(1))
    trained, batch = {"controlnet": tiny.noised(trained["controlnet"])}, rows(sd, hint=True)
    loss, grads = ours(method, trained, frozen, batch, seed, task)
    classes = {"text2img": diffusers.StableDiffusionPipeline, "inpainting": diffusers.StableDiffusionInpaintPipeline}
    pipe = tiny.theirs(sd, tmp_path / "model", classes[kind])
    made = control.taken(method.join(frozen, trained))[1][0]
    sdjax.save_control(made, tmp_path / "control")
    net = diffusers.ControlNetModel.from_pretrained(tmp_path / "control", low_cpu_mem_usage=False)
    pipe.unet.requires_grad_(False)

    def residuals(z_t, times, context):
        maps, middle = net(z_t, times, context, first(batch["control"]["hint"]), return_dict=False)
        return {"down_block_additional_residuals": maps, "mid_block_additional_residual": middle}

    extra = None
    if kind == "inpainting":
        extra = first(task.inputs(frozen, batch, trees.named_key(jax.random.key(seed), "task")).unet.channels)
    theirs = their_loss(sd, pipe, batch, seed, extra, residuals=residuals)
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    assert_alike(grads["controlnet"], net)


def test_inpainting_has_the_gradients_of_diffusers(nine, tmp_path):
    """The masked picture's latent is made in PyTorch too, from the hole that was drawn."""
    method, seed, batch = Full(("unet",)), 6, rows(nine)
    task = tasks.of(nine)
    trained, frozen = method.split(nine)
    loss, grads = ours(method, trained, frozen, batch, seed, task)
    pipe = tiny.theirs(nine, tmp_path / "model", diffusers.StableDiffusionInpaintPipeline)
    k_hole, k_latent = task_keys(batch, seed)
    holes = np.stack([hole(k, (32, 32)) for k in k_hole])
    assert holes.any((1, 2)).all()
    with torch.no_grad():
        masked = encoded(pipe, np.where(holes[..., None], 0, batch["pixels"]), draw(k_latent, (16, 16, 4)))
        mask = torch.nn.functional.interpolate(torch.from_numpy(holes[:, None]).float(), (16, 16))
    theirs = their_loss(nine, pipe, batch, seed, torch.cat([mask, masked], 1))
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    assert_alike(grads["unet"], pipe.unet)


def test_upscaler_has_the_gradients_of_diffusers(tmp_path):
    sd = tiny.model("v_prediction", in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False))
    vae = sd.networks["vae"].clone(config=dataclasses.replace(sd.networks["vae"].config, scaling_factor=0.08333))
    sd = sd.with_networks(vae=vae)  # diffusers' pipeline has no other
    sd = sd.replace(low_schedule=noise_schedule.Schedule(beta_start=0.0001, beta_end=0.02))
    method, seed, batch = Full(("unet",)), 7, rows(sd)
    trained, frozen = method.split(sd)
    loss, grads = ours(method, trained, frozen, batch, seed, tasks.of(sd))
    pipe = tiny.theirs(sd, tmp_path / "model", diffusers.StableDiffusionUpscalePipeline)
    k_level, k_noise = task_keys(batch, seed)
    level = jax.vmap(lambda k: jax.random.randint(k, (), 0, 350))(k_level)
    small = torch.nn.functional.avg_pool2d(first(batch["pixels"]), 2)
    low = noised(sd.low_schedule, small, first(draw(k_noise, (16, 16, 3))), level)
    theirs = their_loss(sd, pipe, batch, seed, low, torch.from_numpy(np.array(level)).long())
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    embedding = "class_embedding.embedding"  # only the drawn levels' rows have a gradient
    moved = np.abs(trees.flatten(grads["unet"])[embedding]).max(1) > 0
    assert set(np.flatnonzero(moved)) == set(np.array(level).tolist())
    assert_alike(grads["unet"], pipe.unet)


# ---- what a ControlNet is ------------------------------------------------------------------------


def test_it_starts_as_a_copy_that_reads_the_latent_alone(nine):
    trained, frozen = ControlNet().split(nine, jax.random.key(1))
    ours, unet = trees.flatten(trained["controlnet"]), trees.flatten(frozen.parts["unet"])
    assert ours["conv_in.kernel"].shape[2] == 4
    np.testing.assert_array_equal(ours["conv_in.kernel"], unet["conv_in.kernel"][:, :, :4])
    same = [name for name in ours if name in unet and name != "conv_in.kernel"]
    assert len(same) > 20 and all(np.array_equal(ours[name], unet[name]) for name in same)
    added = {name.split(".")[0] for name in ours if name not in unet}
    assert added == {"controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"}
    shapes, _ = ControlNet().split(nine)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, trained)


def test_without_a_picture_it_says_so_in_one_line(plain):
    trained, frozen = ControlNet().split(plain, jax.random.key(1))
    joined = ControlNet().join(frozen, trained)
    with pytest.raises(ValueError, match=r"a ControlNet without a picture: expected .*control\.on\(picture\)") as error:
        sdjax.text2img(joined, ["a cat"], steps=2)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the model computes with ControlNet beside its weights"):
        sdjax.save(joined, "nowhere")


def test_memory_counts_what_stands_around_the_model(plain):
    trained, frozen = ControlNet().split(plain, jax.random.key(1))
    joined = ControlNet().join(frozen, trained)
    assert memory.unet(joined, (64, 64), 2) == memory.unet(plain, (64, 64), 2, controls=1)
    assert memory.unet(joined, (64, 64), 2) > memory.unet(plain, (64, 64), 2)


class Reader(Full):
    """Somebody's own method that reads a condition."""

    condition = True


def test_settings_that_do_not_fit():
    canny = Data(condition="canny")
    for wrong, message in (
        (
            Train(method=ControlNet()),
            "data.condition='': expected the condition that the method reads: canny, depth",
        ),
        (Train(method=Full(), data=canny), "data.condition='canny': expected '': Full reads none, as ControlNet does"),
    ):
        with pytest.raises(ValueError, match=message):
            checks.alone(wrong)
    checks.alone(Train(method=Reader(), data=canny))
    with pytest.raises(ValueError, match="order='grb': expected"):
        ControlNet("grb")
    with pytest.raises(ValueError, match="condition='cany': expected one of canny, depth, files"):
        Data(condition="cany")
    with pytest.raises(ValueError, match=r"condition='canny:lo=3': expected canny:low=VALUE, high=VALUE"):
        Data(condition="canny:lo=3")


# ---- runs ----------------------------------------------------------------------------------------

DATA = Data(path="pocketland", size=32, batch=4, condition="canny", source=Pocketland(count=8))
RUN = Train(model="random:tiny", method=ControlNet(), data=DATA, optim=Optim(lr=0.05), steps=2, checkpoint=1, preview=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns (folder of a short run, the model that it joined)."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, train(RUN, out)


def test_the_export_gives_the_same_picture_in_diffusers_and_here(trained, tmp_path):
    out, joined = trained
    sd, (own,) = control.taken(joined)
    hint, noise = tiny.pictures(1, seed=1)[0], tiny.start_noise([4])
    made = sdjax.text2img(sd, ["a cat"], steps=4, seeds=[4], guidance=3.0, control=own.on(hint))
    base = sdjax.text2img(sd, ["a cat"], steps=4, seeds=[4], guidance=3.0)
    assert np.abs(made.astype(int) - base).max() > 3
    net = diffusers.ControlNetModel.from_pretrained(out / "export", low_cpu_mem_usage=False)
    pipe = tiny.theirs(sd, tmp_path / "model", diffusers.StableDiffusionControlNetPipeline, controlnet=net)
    wanted = pipe(
        ["a cat"], image=[Image.fromarray(hint)], num_inference_steps=4, guidance_scale=3.0, output_type="np",
        latents=first(noise),
    ).images  # fmt: skip
    assert tiny.difference(made, wanted) <= 1
    from sdjax import convert

    path = tmp_path / "one.safetensors"
    assert convert.main([str(out / "export"), str(path)]) == 0
    for source in (path, out / "export"):
        again = sdjax.load_control(source)
        assert again.network.config == own.network.config
        jax.tree.map(np.testing.assert_array_equal, again.params, own.params)
    assert (
        controlnet.is_control(path)
        and controlnet.is_control(out / "export")
        and not controlnet.is_control(tmp_path / "model")
    )


def test_a_run_goes_on_from_an_export_and_from_a_checkpoint(trained, tmp_path):
    out, joined = trained
    start, *_ = begin.begin(dataclasses.replace(RUN, init=str(out / "export")), pictures=False)
    jax.tree.map(np.testing.assert_array_equal, start["controlnet"], control.taken(joined)[1][0].params)
    from sdjax.training import export

    path, step = export.write(out, tmp_path / "again", step=2)
    assert step == 2
    name = "diffusion_pytorch_model.safetensors"
    assert (path / name).read_bytes() == (out / "export" / name).read_bytes()
    with pytest.raises(ValueError, match="a ControlNet of another model"):
        begin.begin(dataclasses.replace(RUN, init=str(out / "export"), model="random:pocket"), pictures=False)


@pytest.mark.slow
def test_a_run_that_lost_its_end_comes_to_the_same_bits(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "export")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "2")
    train(RUN, tmp_path / "out")
    places = [folder / "export" / "diffusion_pytorch_model.safetensors" for folder in (trained[0], tmp_path / "out")]
    assert places[0].read_bytes() == places[1].read_bytes()


@pytest.mark.slow
def test_at_rate_zero_the_picture_is_that_of_the_base(tmp_path):
    joined = train(dataclasses.replace(RUN, optim=Optim(lr=0.0), checkpoint=0), tmp_path / "out")
    sd, (own,) = control.taken(joined)
    hint = tiny.pictures(1, seed=1)[0]
    made = sdjax.text2img(sd, ["a cat"], steps=4, control=own.on(hint))
    np.testing.assert_array_equal(made, sdjax.text2img(sd, ["a cat"], steps=4))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mesh", "pmap"])
def test_parallel_modes_give_the_weights_of_one_device(mode, trained, tmp_path):
    one = control.taken(trained[1])[1][0].params
    other = control.taken(train(dataclasses.replace(RUN, parallel=mode, checkpoint=0), tmp_path / "out"))[1][0].params
    norms = [np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])) for tree in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
def test_a_preview_shows_conditions_and_what_follows_them(trained):
    from sdjax.data import batches
    from sdjax.training import preview

    sd = control.taken(trained[1])[0]
    data = batches.build(DATA, sd, 0)
    made = preview.sheet(ControlNet(), trained[1], data, dataclasses.replace(RUN, prompts=("a face", "a cat")))
    sheet = made.sheet
    assert sheet.shape[0] > 4 * 32 and sheet.shape[1] > 3 * 32


def test_half_precision_and_remat_reach_the_controlnet(plain):
    sd = plain.with_dtype("bfloat16", remat=True)
    trained, frozen = ControlNet().split(sd, jax.random.key(1))
    network = ControlNet().join(frozen, trained).wrappers[0].network
    assert network.dtype == jnp.bfloat16 and network.remat
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained)} == {"float32"}
    loss = default_loss(ControlNet(), Train(method=ControlNet()), tasks.of(plain))
    batch, key = rows(plain, hint=True), jax.random.key(2)
    value = jax.eval_shape(lambda tree: loss(frozen, tree, batch, key, jnp.int32(0))[0], trained)
    assert value.dtype == jnp.float32


def test_with_the_way_up_too(plain):
    """sd_locked=False of the ControlNet repository: a Chain with Full; the gradients' shapes alone, which are quick."""
    method = Chain((ControlNet(), Full(("unet",), r"^up_blocks")))
    split, frozen = method.split(plain, jax.random.key(1))
    assert isinstance(method.join(frozen, split).wrappers[0], wrappers.ControlNet)
    loss = default_loss(method, Train(method=method), tasks.of(plain))
    grads = jax.eval_shape(
        jax.grad(lambda tree: loss(frozen, tree, rows(plain, hint=True), jax.random.key(2), jnp.int32(0))[0]), split
    )
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, split)


# ---- tasks and the autoencoder -------------------------------------------------------------------

ROOT = Path(__file__).parents[1] / "configs"
SMALL = ["model=random:tiny", "steps=2", "data.batch=2", "checkpoint=0", "preview=0", "data.size=32", "data.cache=''"]
PIPES = {
    "inpainting": (diffusers.StableDiffusionInpaintPipeline, 9, "python -m sdjax inpaint --image FILE --mask FILE"),
    "upscaler": (diffusers.StableDiffusionUpscalePipeline, 7, "python -m sdjax upscale --image FILE"),
    "vae": (diffusers.StableDiffusionPipeline, 4, "python -m sdjax text2img"),
}


@pytest.mark.parametrize("name", PIPES)
def test_recipes_leave_folders_that_diffusers_opens(name, tmp_path, capsys):
    kind, channels, use = PIPES[name]
    for i, picture in enumerate(tiny.pictures(5, 48)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a face")
    given = [*SMALL, f"data.path={tmp_path}", "optim.lr=0.01"]
    joined = train(sdjax.settings.load(ROOT / f"{name}.py", given), tmp_path / "out")
    said = capsys.readouterr().out
    assert f"{use} --model" in said and f"{kind.__name__}.from_pretrained" in said
    pipe = kind.from_pretrained(tmp_path / "out" / "export", low_cpu_mem_usage=False, safety_checker=None)
    assert pipe.unet.config.in_channels == channels
    again, base = sdjax.load(tmp_path / "out" / "export"), sdjax.load("random:tiny")
    part = "vae" if name == "vae" else "unet"
    jax.tree.map(np.testing.assert_array_equal, again.parts[part], joined.parts[part])
    moved = [key for key, x in trees.flatten(again.parts[part]).items()
             if key in (old := trees.flatten(base.parts[part])) and not np.array_equal(x, old[key])]  # fmt: skip
    if name == "vae":
        assert moved and all(key.startswith(("decoder.", "post_quant_conv.")) for key in moved)
        assert trees.digest(again.parts["unet"]) == trees.digest(base.parts["unet"])
    else:
        assert "conv_in.kernel" in moved and tasks.of(again).name == tasks.of(joined).name != "text2img"
    if name == "upscaler":
        assert pipe.low_res_scheduler.config.beta_end == 0.02 == again.low_schedule.beta_end
