"""Every recipe on five pictures with captions, as its documentation says it, and what its export does to a picture."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from programs import ROOT

import sdjax
import sdjax.settings
from sdjax import tasks
from sdjax.diffusion import wrappers
from sdjax.formats import pipeline
from sdjax.formats.adapters import e4t
from sdjax.runtime import compile_cache
from sdjax.training import checks, program, run_folder
from sdjax.training.begin import begin
from sdjax.training.unrounded import unrounded

TINY = ["data.size=32", "preview=0"]  # for random:tiny, which draws 32 x 32
# What each leaves in export/, "run" being the run's folder; "" is a model's folder.
LEFT = {
    "controlnet": ["config.json", "diffusion_pytorch_model.safetensors"],
    "custom_diffusion": ["learned_embeds.safetensors", "pytorch_custom_diffusion_weights.safetensors"],
    "dreambooth": ["model_index.json", "unet/diffusion_pytorch_model.safetensors"],
    "dreambooth_word": ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"],
    "e4t_pretrain": ["model_index.json", "e4t/encoder.safetensors", "e4t/offsets.safetensors"],
    "e4t_tune": ["model_index.json", "e4t/encoder.safetensors", "e4t/concept.png"],
    "full": ["model_index.json", "unet/diffusion_pytorch_model.safetensors"],
    "hypernetwork": ["run.pt"],
    "inpainting": ["model_index.json", "unet/diffusion_pytorch_model.safetensors"],
    "lora": ["run.safetensors"],
    "pivotal": ["run.safetensors"],
    "textual_inversion": ["learned_embeds.safetensors"],
    "upscaler": ["model_index.json", "low_res_scheduler/scheduler_config.json"],
    "vae": ["model_index.json", "vae/diffusion_pytorch_model.safetensors"],
}
GIVEN = {
    "e4t_pretrain": ["vision="],
    # In float32: the file keeps what the encoder read in the run, which bfloat16 rounds.
    "e4t_tune": ["vision=", "init=pocket", "optim.lr=1e-3", "compute=float32", "frozen=float32"],
    "vae": ["optim.lr=1e-2"],  # its average, of decay 0.999, moves by nothing in three steps of 1e-5
}
QUICK = ("textual_inversion",)


def test_these_are_all_recipes():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(LEFT)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five pictures with captions, of 48 x 64."""
    monkeypatch.setattr(compile_cache, "keep", lambda **_: None)
    monkeypatch.chdir(tmp_path)  # where relative folders of settings are
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(tiny.pictures(5, 64)):
        Image.fromarray(picture[:48]).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text("a face, on the beach")
    return tmp_path


def run(name, model, folder, *more):
    """Runs a recipe as a command line does; returns (its settings, the run's folder)."""
    out = folder / ("still" if "optim.lr=0" in more else "moved") / "run"
    photos = folder / "photos" / ("0.png" if name == "e4t_tune" else "")
    given = [f"model={model}", f"data.path={photos}", "steps=3", f"out={out}", *GIVEN.get(name, []), *more]
    recipe = str(ROOT / "configs" / f"{name}.py")
    assert program.main([recipe, *given]) == 0
    return checks.worded(sdjax.settings.load(recipe, given)), out


def exact(settings):
    """Returns the settings of the same run in float32."""
    return dataclasses.replace(settings, compute="float32", frozen="float32")


def base(settings, name, shown):
    """Returns the model before the run, where a new word means what it meant before the first step."""
    sd = sdjax.load(settings.model)
    if name == "e4t_tune":
        return e4t.personalise(sd, pipeline.locate(settings.model), shown)
    if settings.method.words:
        trained, frozen, *_ = begin(exact(settings), pictures=False)
        joined = settings.method.join(frozen, trained)
        return joined if name != "e4t_pretrain" else e4t.look(joined, np.float32(shown / 127.5 - 1))
    return tasks.of(sd, settings.task).prepare(sd, jax.random.key(0))


def untrained(settings, name, folder, shown):
    """Returns the picture before the run, by the program that an export draws with: its last bits are that program's.

    Of a method with words it is the export of what has not been trained, which draws as the model before does.
    """
    before = picture(base(settings, name, shown), settings, shown)
    if not settings.method.words:
        return before
    trained, frozen, *_ = begin(settings)
    run_folder.export(settings.method, unrounded(frozen, settings), trained, folder / "before")
    same = picture(with_export(name, folder / "before", settings, shown), settings, shown)
    near = 4e-3 if settings.compute == "bfloat16" else 1e-4  # a level of 255 is 8e-3
    np.testing.assert_allclose(same, before, atol=near)
    return same


def with_export(name, export, settings, shown):
    """Returns the model with what the run left, as files of this kind are used."""
    if (export / "model_index.json").exists():
        sd = sdjax.load(export)
        return e4t.personalise(sd, export, shown) if name == "e4t_pretrain" else sd
    sd = sdjax.load(settings.model)
    if name == "controlnet":
        own = sdjax.load_control(export)
        return sd.add(wrappers=wrappers.ControlNet(own.params, network=own.network))
    for file in sorted(path for path in export.iterdir() if path.suffix in (".safetensors", ".pt")):
        sd = sdjax.attach(sd, file)
    return sd


@functools.partial(jax.jit, static_argnames="task")
def drawn(sd, ids, batch, task):
    """Returns pictures float32 [1 H W 3]: latents of noise less the noise that the model sees in them, decoded."""
    told = tasks.known()[task].inputs(sd, batch, jax.random.key(5))
    height, width = (side // sd.factor for side in batch["pixels"].shape[1:3])
    z = jax.random.normal(jax.random.key(2), (1, height, width, sd.networks["vae"].config.latent_channels))
    cond = told.over(sd.condition(ids)).with_own(control=batch["control"])
    return sd.decode(z - sd.denoise(z, np.array([700.0], np.float32), cond)[0])


def picture(sd, settings, shown):
    words = " ".join(settings.method.words) or "sks"
    pixels = np.float32(shown[None] / 127.5 - 1)
    batch = {"pixels": pixels, "control": {"hint": (pixels + 1) / 2}, "index": np.arange(1, dtype=np.int32)}
    task = tasks.of(sd, settings.task).name
    return np.asarray(drawn(sd.bare, sd.tokenize([f"a photo of {words}, face"]), batch, task))


@pytest.mark.parametrize(
    ("name", "model"),
    [*((name, "random:tiny") for name in QUICK), *(pytest.param(n, "pocket", marks=pytest.mark.slow) for n in LEFT)],
)
def test_recipe_leaves_a_file_that_changes_pictures_and_at_rate_zero_none(name, model, folder):
    more = TINY if model == "random:tiny" else []
    shown = tiny.pictures(1, 32 if more else 64, seed=4)[0]
    settings, out = run(name, model, folder, *more)
    assert all((out / "export" / file).is_file() for file in LEFT[name])
    if name == "e4t_tune":
        shown = np.asarray(Image.open(out / "export" / "e4t" / "concept.png"))
    before = untrained(settings, name, folder, shown)
    moved = picture(with_export(name, out / "export", settings, shown), settings, shown)
    assert np.abs(moved - before).max() > 0
    settings, out = run(name, model, folder, *more, "optim.lr=0")
    np.testing.assert_array_equal(picture(with_export(name, out / "export", settings, shown), settings, shown), before)
