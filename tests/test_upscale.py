"""The x4 upscaler against diffusers, in tiles, and hires fix."""

import dataclasses
import types

import diffusers
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale as upscale_module
import numpy as np
import pytest
import tiny
from PIL import Image

import sdjax
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.sampling import denoising, upscaling

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own


@pytest.fixture(scope="module")
def sd():
    sd = tiny.model("v_prediction", in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False))
    vae = sd.networks["vae"].clone(config=dataclasses.replace(sd.networks["vae"].config, scaling_factor=0.08333))
    sd = sd.with_networks(vae=vae)  # diffusers' pipeline has no other
    return sd.replace(low_schedule=Schedule(beta_start=0.0001, beta_end=0.02))


def test_gives_the_picture_of_diffusers(sd, tmp_path, monkeypatch):
    pipe = tiny.theirs(sd, tmp_path / "model", diffusers.StableDiffusionUpscalePipeline)
    assert pipe.low_res_scheduler.config.beta_end == 0.02
    again = sdjax.load(tmp_path / "model")
    assert (again.low_schedule.beta_start, again.low_schedule.beta_end) == (0.0001, 0.02)
    given, shape = tiny.pictures(2, 12), (12, 12, 3)
    left = tiny.give(
        monkeypatch,
        upscale_module,
        tiny.picture_noise([4, 5], shape),
        tiny.start_noise([4, 5], (12, 12, 4)),
    )
    theirs = pipe(
        tiny.PROMPTS, image=[Image.fromarray(one) for one in given], num_inference_steps=10, guidance_scale=5.0,
        noise_level=80, negative_prompt=tiny.NEGATIVE, output_type="np",
    ).images  # fmt: skip
    ours = sdjax.upscale(
        again,
        tiny.PROMPTS,
        list(given),
        noise_level=80,
        steps=10,
        guidance=5.0,
        negative_prompt=tiny.NEGATIVE,
        seeds=[4, 5],
    )
    assert ours.shape == (2, 24, 24, 3) and not left
    assert tiny.difference(ours, theirs) <= 1


def test_noise_level_compiles_nothing_and_counts(sd):
    given = tiny.pictures(1, 12)[0]
    one = sdjax.upscale(sd, [""], given, steps=3, noise_level=0)
    before = denoising._sample._cache_size()
    other = sdjax.upscale(sd, [""], given, steps=5, noise_level=350)
    assert denoising._sample._cache_size() == before and np.abs(one.astype(int) - other).mean() > 1


def test_any_picture_is_brought_to_a_preset_size(sd):
    assert sdjax.upscale(sd, [""], tiny.pictures(1, 30)[0][:25], size=12, steps=3).shape == (1, 24, 24, 3)


def test_tiles_cover_the_whole(sd):
    given = tiny.pictures(1, 20)[0]
    made = sdjax.upscale(sd, [""], given, steps=3, tile=12, overlap=4)
    assert made.shape == (1, 40, 40, 3)
    np.testing.assert_array_equal(
        sdjax.upscale(sd, [""], given[:12, :12], steps=3, tile=12), sdjax.upscale(sd, [""], given[:12, :12], steps=3)
    )


@pytest.mark.parametrize("tile", [8, 16])
def test_tiles_share_at_most_half_of_themselves(monkeypatch, tile):
    """The default overlap of 16 leaves such tiles nothing of their own."""
    shared = dataclasses.make_dataclass("Shared", ["tile", "overlap"])(tile, 16)
    seen = []
    monkeypatch.setattr(upscaling, "decode", lambda sd, z: np.asarray(z))
    monkeypatch.setattr(upscaling, "run", lambda sd, job, start, cond: seen.append(start.shape) or start)
    job = types.SimpleNamespace(settings=shared, start_noise=lambda shape: np.ones((1, *shape), np.float32))
    config = types.SimpleNamespace(latent_channels=4)
    sd = types.SimpleNamespace(networks={"vae": types.SimpleNamespace(config=config)})
    cond = types.SimpleNamespace(with_unet=lambda **_: None)
    made = upscaling._enlarged(sd, job, np.zeros((1, 40, 24, 3), np.float32), cond)
    np.testing.assert_allclose(made, np.ones((1, 40, 24, 4)), rtol=1e-6)
    assert set(seen) == {(1, tile, tile, 4)}


def test_the_second_pass_has_settings_of_its_own(monkeypatch):
    own = dict(hires_prompt="b", hires_negative_prompt="c", hires_sampler="euler", hires_guidance=2.0, hires_steps=3)
    seen = []
    monkeypatch.setattr(upscaling, "run", lambda sd, job, start, **_: seen.append(job.settings) or start)
    monkeypatch.setattr(upscaling, "decode", lambda sd, z: z)
    sdjax.hires(tiny.model(), ["a"], steps=2, hires_strength=1.0, **own)
    first, second = seen
    assert (first.texts, first.sampler, first.guidance, first.steps) == (("a", ""), "ddim", 7.5, 2)
    assert (second.texts, second.sampler, second.guidance, second.steps) == (("b", "c"), "euler", 2.0, 3)


def test_nearest_repeats_the_pixels_of_the_first_pass(monkeypatch):
    small, seen = tiny.pictures(2), []
    monkeypatch.setattr(upscaling, "run", lambda sd, job, start, **_: start)
    monkeypatch.setattr(upscaling, "decode", lambda sd, z: small)
    monkeypatch.setattr(upscaling, "encode", lambda sd, shown, keys: seen.append(shown))
    sdjax.hires(tiny.model(), ["a cat"] * 2, steps=1, hires_method="nearest", hires_strength=1.0, scale=2)
    np.testing.assert_array_equal(seen[0], np.repeat(np.repeat(small, 2, 1), 2, 2))


@pytest.mark.parametrize("method", ["latent", "lanczos"])
def test_hires_is_the_first_pass_enlarged_and_painted_over(method):
    sd = tiny.model()
    made = sdjax.hires(sd, ["a cat"], steps=4, hires_method=method, hires_strength=0.25, scale=1.5)
    small = sdjax.text2img(sd, ["a cat"], steps=4)[0]
    assert made.shape == (1, 48, 48, 3)
    if method == "lanczos":  # the way through pixels is no way back for an autoencoder with random weights
        return
    shrunk = np.asarray(Image.fromarray(made[0]).resize((32, 32), Image.Resampling.BOX)).astype(int)
    other = sdjax.text2img(sd, ["a cat"], steps=4, seeds=[9])[0]
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > np.corrcoef(shrunk.ravel(), other.ravel())[0, 1] + 0.2


def test_the_second_pass_goes_on_with_the_schedule_of_prompts():
    """[a:b:N] in its second pass: a whole number counts on from the first, a part from 1; A1111's prompt_parser."""
    words = {"whole": "[cat:snow:4]", "part": "[cat:snow:1.0]", "later": "[cat:snow:6]", "never": "cat"}
    made = sdjax.hires(
        tiny.model(), [f"a {said} face" for said in words.values()], seeds=[0] * 4, steps=4, grammar="a1111",
        hires_strength=0.9, scale=1.0, guidance=15.0,
    )  # fmt: skip
    of = dict(zip(words, made.astype(int), strict=True))
    assert np.abs(of["whole"] - of["part"]).max() <= 1  # cat in the first pass, snow from the second on
    assert np.abs(of["whole"] - of["later"]).max() > 1
    assert np.abs(of["part"] - of["never"]).max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_level": 351}, "noise_level=351: expected a whole number, 0 to 350"),
        ({"guidance": 2, "seeds": [1, 2]}, "2 seeds"),
    ],
)
def test_options_that_do_not_fit(sd, options, message):
    with pytest.raises(ValueError, match=message):
        sdjax.upscale(sd, [""], tiny.pictures(1, 12)[0], **options)


def test_what_does_not_fit_hires():
    sd = tiny.model()
    with pytest.raises(ValueError, match="hires_method='bicubic': expected one of latent, lanczos, nearest"):
        sdjax.hires(sd, ["a cat"], hires_method="bicubic")
    with pytest.raises(ValueError, match="expected an upscaler"):
        sdjax.upscale(sd, ["a cat"], tiny.pictures(1, 12)[0])
