"""Image-to-image against diffusers, sizes, steps counted by strength, and ways between seeds and prompts."""

import os
import subprocess
import sys

import diffusers
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img as img2img_module
import numpy as np
import pytest
import tiny
from PIL import Image

import sdjax
from sdjax.images import resize
from sdjax.sampling import denoising, slerp, tiles
from sdjax.service import records

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own


@pytest.fixture(scope="module")
def sd():
    return tiny.model()


@pytest.mark.parametrize("prediction", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
def test_gives_the_picture_of_diffusers(prediction, tmp_path, monkeypatch):
    sd, given = tiny.model(prediction), tiny.pictures()
    pipe = tiny.theirs(sd, tmp_path / "model", diffusers.StableDiffusionImg2ImgPipeline)
    for name, sampler, strength in (("DDIMScheduler", "ddim", 0.6), ("EulerDiscreteScheduler", "euler", 1.0)):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        left = tiny.give(monkeypatch, img2img_module, tiny.picture_noise([4, 5]), tiny.start_noise([4, 5]))
        theirs = pipe(
            tiny.PROMPTS, image=[Image.fromarray(one) for one in given], strength=strength, num_inference_steps=10,
            guidance_scale=5.0, negative_prompt=tiny.NEGATIVE, output_type="np",
        ).images  # fmt: skip
        ours = sdjax.img2img(
            sd, tiny.PROMPTS, list(given), strength=strength, steps=10, guidance=5.0, negative_prompt=tiny.NEGATIVE,
            seeds=[4, 5], sampler=sampler,
        )  # fmt: skip
        assert not left and tiny.difference(ours, theirs) <= 1


def test_strength_steps_and_another_picture_compile_nothing(sd):
    given = tiny.pictures(1)[0]
    sdjax.img2img(sd, ["a cat"], given, strength=0.5, steps=4)
    before = denoising._sample._cache_size(), tiles._moments._cache_size()
    sdjax.img2img(sd, ["a face"], 255 - given, strength=0.9, steps=7, seeds=3, guidance=2.0)
    assert (denoising._sample._cache_size(), tiles._moments._cache_size()) == before


def test_less_strength_keeps_more(sd):
    given = tiny.pictures(1)[0]
    far = [
        np.abs(sdjax.img2img(sd, ["a cat"], given, strength=s, steps=10)[0].astype(int) - given).mean()
        for s in (0.1, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]


def test_any_size_is_made(sd):
    given = tiny.pictures(1)[0][:27, :31]
    assert sdjax.img2img(sd, ["a cat"], given, steps=4, strength=0.5).shape == (1, 27, 31, 3)
    assert sdjax.img2img(sd, ["a cat"], given, steps=4, strength=0.5, size=(22, 33)).shape == (1, 22, 33, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "strength=1.5: expected more than 0, to 1"),
        ({"strength": 0.1, "steps": 5}, "strength=0.1: none of 5 steps is left; expected at least 0.2"),
        ({"resize": "shrink", "size": 16}, "resize='shrink': expected one of crop, fill, stretch"),
        ({"pictures": np.zeros((4, 4, 3))}, "a picture of type float64"),
        ({"pictures": list(tiny.pictures(3))}, "3 pictures for 2 prompts"),
    ],
)
def test_options_that_do_not_fit(sd, options, message):
    with pytest.raises(ValueError, match=message):
        sdjax.img2img(sd, tiny.PROMPTS, options.pop("pictures", tiny.pictures(1)[0]), **options)


def test_resize_modes():
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 20:] = 200
    assert resize.fit(wide, (10, 40)) is wide
    crop, fill, stretch = (resize.fit(wide, (20, 20), mode) for mode in resize.MODES)
    assert crop.shape == fill.shape == stretch.shape == (20, 20, 3)
    assert (crop[:, 0] == 0).all() and (crop[:, -1] == 200).all()
    np.testing.assert_array_equal(fill[0], fill[10])  # the upper edge is repeated
    np.testing.assert_array_equal(stretch[:, 0], crop[:, 0])
    padded = resize.pad(wide[None, :, :37], 8)
    assert padded.shape == (1, 16, 40, 3)
    np.testing.assert_array_equal(padded[0, :10, :37], wide[:, :37])
    assert (padded[0, 10:, 0] == 0).all() and (padded[0, :, 37:] == 200).all()


def test_slerp_is_the_arc():
    random = np.random.default_rng(0)
    low, high = random.standard_normal((2, 3, 8, 5, 4))
    middle = np.asarray(slerp.slerp(low.astype(np.float32), high.astype(np.float32), 0.3))
    for b, x, c in ((0, 0, 0), (2, 4, 3)):  # columns of 8, as A1111 has them
        one, two = low[b, :, x, c], high[b, :, x, c]
        angle = np.arccos(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
        wanted = (np.sin(0.7 * angle) * one + np.sin(0.3 * angle) * two) / np.sin(angle)
        np.testing.assert_allclose(middle[b, :, x, c], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slerp.slerp(low.astype(np.float32), low.astype(np.float32), 0.3), low, atol=1e-5)


def test_variations_lie_between_two_seeds(sd):
    make = {"steps": 4, "seeds": [1]}
    own, other = sdjax.text2img(sd, ["a cat"], **make), sdjax.text2img(sd, ["a cat"], **{**make, "seeds": [9]})
    none, some, all_ = (sdjax.text2img(sd, ["a cat"], variation_seed=9, variation=v, **make) for v in (0.0, 0.2, 1.0))
    np.testing.assert_array_equal(none, own)
    assert np.abs(all_.astype(int) - other).max() <= 1
    assert 0 < np.abs(some.astype(int) - own).mean() < np.abs(other.astype(int) - own).mean()


def test_interpolation_begins_and_ends_where_it_should(sd):
    made = sdjax.interpolate(sd, tiny.PROMPTS, 3, seeds=(1, 9), steps=4)
    ends = sdjax.text2img(sd, tiny.PROMPTS, seeds=[1, 9], steps=4)
    assert np.abs(made[[0, 2]].astype(int) - ends).max() <= 1
    assert min(np.abs(made[1].astype(int) - end).mean() for end in ends) > 1


def test_frames_do_not_depend_on_how_many_are_made_at_once(sd):
    settings = dict(seeds=(1, 9), steps=3, sampler="euler_a", variation_seed=3, variation=0.2)
    together, apart = (sdjax.interpolate(sd, tiny.PROMPTS, 3, batch=n, **settings) for n in (None, 2))
    assert np.abs(together.astype(int) - apart).max() <= 1
    first = sdjax.text2img(sd, tiny.PROMPTS[:1], **{**settings, "seeds": [1]})
    assert np.abs(together[0].astype(int) - first[0]).max() <= 1
    with pytest.raises(ValueError, match="frames=1: expected a whole number, 2 to 1000"):
        sdjax.interpolate(sd, "a", 1)


def test_the_program_writes_frames_and_a_moving_picture(tmp_path):
    command = [sys.executable, "sample/interpolate.py", "--model", "random:tiny", "--prompt", "a face", "a cat"]
    command += "--steps 2 --frames 3 --batch 2 --to-seed 5 --seed 2 --out".split() + [str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": ".", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "moving.webp") as moving:
        assert (moving.n_frames, moving.size) == (3, (32, 32))
    record = records.read(tmp_path / "00002.png")
    assert (record["prompt"], record["seed"]) == ("a face", 2)
    assert (record["to_seed"], record["to_prompt"], record.more) == (5, "a cat", {"Frame": "3/3"})


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("img2img", ["--strength", "2"], "--strength='2': expected more than 0, to 1"),
        ("inpaint", ["--mask", "{folder}/black.png"], "the mask is empty"),
        ("upscale", [], "expected an upscaler"),
        ("controlnet", ["--control", "random:tiny", "--control-image", "{folder}/a.png", "--start", "1"], "start=1.0"),
        ("img2img", ["--steps", "2", "--size", "24x18"], None),
        ("interpolate", ["--frames", "1"], "--frames='1': expected"),
    ],
)
def test_programs(program, arguments, message, tmp_path):
    Image.fromarray(tiny.pictures(1)[0]).save(tmp_path / "a.png")
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    command = [sys.executable, f"sample/{program}.py", "--model", "random:tiny", "--prompt", "a face"]
    command += ["--out", str(tmp_path / "out"), *(part.format(folder=tmp_path) for part in arguments)]
    command += [] if program in ("controlnet", "interpolate") else ["--image", str(tmp_path / "a.png")]
    env = {**os.environ, "PYTHONPATH": ".", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in done.stderr and done.returncode == (message is not None), done.stderr
    if message:
        assert len(lines) == 1 and message in lines[0]
    else:
        with Image.open(tmp_path / "out" / "00000-0.png") as made:
            assert made.size == (24, 18)


def test_one_prompt_and_one_seed_are_both_ends(sd):
    made = sdjax.interpolate(sd, ["a face"], 2, seeds=np.int64(3), steps=2)
    alone = sdjax.text2img(sd, ["a face"], seeds=[3], steps=2)
    assert np.abs(made.astype(int) - alone).max() <= 1
    np.testing.assert_array_equal(sdjax.interpolate(sd, "a face", 2, seeds=np.array([3]), steps=2), made)
    with pytest.raises(ValueError, match=r"^prompts=\['a', 'b', 'c'\]: expected one, or two"):
        sdjax.interpolate(sd, ["a", "b", "c"], 2)
