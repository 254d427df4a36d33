"""Pictures against diffusers' pipeline, and what a picture may depend on."""

import dataclasses
import os
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import struct

import sdjax
from sdjax import trees
from sdjax.formats import pipeline
from sdjax.models.conditioner import Conditioner
from sdjax.sampling import denoising, generate, seamless, tiles
from sdjax.sampling.settings import TextToImage

PROMPTS = ["a photo of a face on the beach", "a mosaic of a cat"]


@pytest.fixture(scope="module")
def sd():
    return pipeline.load("random:tiny")


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """Our model and diffusers' pipeline of the folder that we wrote; every leaf holds noise."""
    from diffusers import StableDiffusionPipeline

    sd = pipeline.load("random:tiny")
    random = np.random.default_rng(3)
    noised = {
        part: jax.tree.map(
            lambda x: jnp.asarray(x + 0.03 * random.standard_normal(x.shape, np.float32)), sd.parts[part]
        )
        for part in ("unet", "vae", "text_encoder")
    }
    schedule = dataclasses.replace(sd.schedule, prediction_type=request.param)
    sd = sd.with_parts(**noised).replace(schedule=schedule)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    sdjax.save(sd, folder)
    return sd, StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False), request.param


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own
@pytest.mark.parametrize(
    ("pair", "sampler"),
    [("epsilon", "ddim"), ("epsilon", "dpmpp_2m"), ("v_prediction", "ddim"),
     *(pytest.param(*one, marks=pytest.mark.slow)
       for one in (("epsilon", "euler"), ("v_prediction", "euler"), ("v_prediction", "dpmpp_2m")))],
    indirect=["pair"],
)  # fmt: skip
def test_twenty_steps_give_the_picture_of_diffusers(pair, sampler):

    sd, pipe, _ = pair
    classes = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
    pipe.scheduler = getattr(diffusers, classes[sampler]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).standard_normal((2, 16, 16, 4)).astype(np.float32)
    theirs = pipe(
        PROMPTS, negative_prompt=["red hair", ""], num_inference_steps=20, guidance_scale=5.0, output_type="np",
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), height=32, width=32,
    ).images  # fmt: skip
    ours = sdjax.text2img(
        sd, PROMPTS, negative_prompt=["red hair", ""], guidance=5.0, steps=20, sampler=sampler, noise=noise
    )
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own
@pytest.mark.parametrize("pair", ["epsilon"], indirect=True)
def test_a_seamless_picture_is_that_of_diffusers_with_circular_convolutions(pair):
    """As A1111's tiling sets them; a picture of tiles has no seam either."""
    sd, pipe, _ = pair
    layers = [one for net in (pipe.unet, pipe.vae) for one in net.modules() if isinstance(one, torch.nn.Conv2d)]
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 4)).astype(np.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        for one in layers:
            one.padding_mode = "circular"
        theirs = pipe("a cat", num_inference_steps=3, guidance_scale=1.0, output_type="np", height=32, width=32,
                      latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())).images  # fmt: skip
    finally:
        for one in layers:
            one.padding_mode = "zeros"
    how = dict(guidance=1.0, steps=3, noise=noise)
    ours = sdjax.text2img(sd, ["a cat"], seamless=True, **how)
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1
    assert np.abs(ours.astype(int) - sdjax.text2img(sd, ["a cat"], **how)).max() > 5
    wrapping = seamless.of(sd, TextToImage(prompt="a", seamless=True))
    whole, tiled = (np.asarray(tiles.decode(wrapping, jnp.asarray(noise), tile)) for tile in (None, 16))
    plain = np.asarray(tiles.decode(sd, jnp.asarray(noise)))
    edge = np.abs(tiled - whole)[:, :2].mean()
    assert edge < 0.3 * np.abs(plain - whole)[:, :2].mean()


def test_a_picture_depends_on_its_own_seed_only(sd):
    together = sdjax.text2img(sd, [PROMPTS[0]] * 3, seeds=[5, 6, 7], steps=4, sampler="euler_a")
    alone = sdjax.text2img(sd, [PROMPTS[0]], seeds=[6], steps=4, sampler="euler_a")
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 8


def test_steps_seeds_prompts_and_guidance_compile_nothing_new(sd):
    sdjax.text2img(sd, PROMPTS, seeds=[1, 2], steps=3)
    before = denoising._sample._cache_size()
    sdjax.text2img(sd, PROMPTS[::-1], seeds=[8, 9], steps=5, guidance=3.0, negative_prompt="a cat")
    assert denoising._sample._cache_size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ouler"}, "sampler='ouler'"),
        ({"size": 33}, "size=33x33: expected sides that are multiples of 2, such as 32x32"),
        ({"seeds": [1]}, "2 prompts, 1 seeds"),
        ({"noise": np.zeros((2, 8, 8, 4))}, "expected"),
        ({"schedule": "linear"}, "linear"),
        ({"ensd": 31337}, "ensd=31337: noise_source='jax' has none"),
        ({"guidance": float("nan")}, "guidance=nan: expected a finite number"),
        ({"guidance": 1e39}, "guidance=1e.39: expected a finite number, at most 3.4e.38"),
        ({"guidance": -(10**400)}, "guidance=-1000.*: expected a finite number, at most 3.4e.38"),
        ({"guidance": np.float16(np.inf)}, "guidance=inf: expected a finite number"),
        ({"seeds": [1, 1 << 64]}, "seed=18446744073709551616: expected a whole number"),
        ({"rescale": 5}, "rescale=5: expected 0 to 1"),
        ({"guidance": 1e39}, "guidance=1e.39: expected a finite number"),
        ({"variation": [0.1, 3]}, "variation=3: expected 0 to 1"),
        ({"variation": [0.3]}, "2 prompts, 1 variation: expected as many"),
        ({"variation_seed": 0.5, "variation": 0.3}, "variation_seed=0.5: expected a whole number"),
        ({"eta": 2}, "eta=2: expected 0 to 1"),
        ({"churn": -1}, "churn=-1: expected 0 or more"),
        ({"churn_high": float("nan")}, "churn_high=nan: expected 0 or more"),
        ({"threshold_limit": 0}, "threshold_limit=0: expected above 0"),
        ({"steps": 2.5}, "steps=2.5: expected a whole number, 1 or more"),
        ({"clip_skip": 0}, "clip_skip=0: expected a whole number, 1 or more"),
        ({"clip_skip": 9}, "clip_skip=9: expected 1 to 2, the layers of the text encoder"),
        ({"skip": 1}, "skip: unknown; expected clip_skip"),
        ({"negative": "red"}, "negative: unknown; expected negative_prompt"),
        ({"seeds": [1, "2"]}, "seed='2': expected a whole number"),
        ({"grammar": "compel"}, "grammar='compel': expected one of plain, a1111, comfyui"),
        ({"weighting": "nonsense", "grammar": "a1111"}, "weighting='nonsense': expected one of a1111, comfyui"),
        ({"weighting": "a1111"}, "weighting='a1111': grammar='plain' has no weights; expected"),
        ({"noise_source": "dice"}, "noise_source='dice': expected one of jax, torch-cpu, philox"),
    ],
)
def test_options_that_do_not_fit(sd, options, message):
    with pytest.raises(ValueError, match=message):
        sdjax.text2img(sd, PROMPTS, **options)


LONG = ", ".join(["a face on the beach"] * 6)  # two chunks of the tiny model
MIXED = ["a (cat:1.3)", LONG, "a dog AND snow:0.5", "a [cat|dog]"]


def test_settings_may_be_numbers_of_numpy():
    given = dict(guidance=np.float32(2), churn_high=np.inf, steps=np.int32(4))
    made = generate.job(TextToImage, ["a"], seeds=np.int64(3), **given)
    assert made.each("seed") == [3] and type(made.settings.guidance) is float


def test_pictures_of_one_call_differ_in_what_is_their_own_alone():
    with pytest.raises(ValueError, match=r"steps=\[3, 4\]: expected one for all pictures of a call"):
        generate.Job((TextToImage(steps=3), TextToImage(steps=4)))


def test_seeds_have_64_bits():
    def data(*seeds):
        return jax.random.key_data(generate.job(TextToImage, ["a"] * len(seeds), seeds=seeds).keys)

    plain = jnp.stack([jax.random.key_data(jax.random.key(np.uint32(seed))) for seed in (0, 7, 2**32 - 1)])
    np.testing.assert_array_equal(data(0, 7, 2**32 - 1), plain)
    np.testing.assert_array_equal(data(0, 7, -1), plain)  # as 32 bits
    np.testing.assert_array_equal(data(0, 7, 2**32 - 1, 2**32 + 7)[:3], plain)  # whatever seeds are beside them
    many = (7, 2**32 + 7, 2**33 + 7, -(2**32) - 7, 2**63 + 7, np.uint64(2**63 + 2**32 + 7), -(2**63) + 2**33 + 7)
    assert len(np.unique(data(*many), axis=0)) == len(many)


class Breaks(struct.PyTreeNode, Conditioner):
    """A conditioner after which the rows' predictions are not finite from a step on, counted from 1; 0 for never."""

    steps: jax.Array

    def __call__(self, sd, z, t, i, cond):
        broken = (self.steps > 0) & (i + 1 >= self.steps)
        return cond.with_unet(context=jnp.where(broken[:, None, None], jnp.inf, cond.unet.context)), {}


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun", "unipc"])
def test_latents_that_are_not_finite_are_an_error_that_names_the_step(sd, sampler):
    broken = sd.add(conditioners=Breaks(jnp.array([0, 4, 3])))
    with pytest.raises(
        ValueError, match="^latents: not finite from step 3 of 5 on, in 2 of 3 pictures; expected .*float32"
    ):
        sdjax.text2img(broken, ["a"] * 3, steps=5, sampler=sampler, guidance=1.0)
    assert sdjax.text2img(sd.add(conditioners=Breaks(jnp.array([0]))), ["a"], steps=5, guidance=1.0).max() > 0


def test_weights_that_are_not_finite_are_errors(sd):
    def spoilt(part, name):
        return sd.with_parts(**{part: trees.edit(sd.parts[part], name, lambda _, w: w.at[0].set(jnp.nan))})

    with pytest.raises(ValueError, match="^latents: not finite from step 1 of 2 on, in 1 of 1 pictures"):
        sdjax.text2img(spoilt("unet", r"^conv_in\.bias$"), ["a"], steps=2)
    with pytest.raises(ValueError, match="^latents: not finite from step 1 of 2"):
        sdjax.text2img(spoilt("text_encoder", r"final_layer_norm\.bias$"), ["a"], steps=2)
    with pytest.raises(
        ValueError, match="^pixels: not finite in 1 of 1 pictures; expected an autoencoder of finite weights"
    ):
        sdjax.text2img(spoilt("vae", r"^decoder\.conv_out\.bias$"), ["a"], steps=2)
    with pytest.raises(ValueError, match="^latents of the given pictures: not finite in 1 of 1"):
        sdjax.img2img(spoilt("vae", r"^encoder\.conv_in\.bias$"), ["a"], np.zeros((32, 32, 3), np.uint8), steps=2)


@pytest.mark.parametrize("grammar", [pytest.param("a1111", marks=pytest.mark.slow), "comfyui"])
def test_a_picture_depends_on_its_own_prompt_only(sd, grammar):
    """Prompts of one and two chunks, and with AND, in the order asked for."""
    settings = dict(steps=3, sampler="euler_a", grammar=grammar, negative_prompt=["", "", "", "red"], guidance=12.0)
    settings |= dict(noise_source="torch-cpu")
    together = sdjax.text2img(sd, MIXED, seeds=[5, 6, 7, 8], **settings)
    for i, text in enumerate(MIXED):
        alone = sdjax.text2img(
            sd, [text], seeds=[5 + i], **{**settings, "negative_prompt": settings["negative_prompt"][i]}
        )
        assert np.abs(together[i].astype(int) - alone[0]).max() <= 1, text


@pytest.mark.slow
def test_a_batch_of_several_sizes_compiles_once_a_size(sd):
    settings = dict(steps=3, grammar="a1111")
    sdjax.text2img(sd, [LONG, "a", "b"], **settings)
    before = denoising._sample._cache_size()
    sdjax.text2img(sd, ["a", LONG, LONG], **settings)
    sdjax.text2img(sd, ["a", "b", "c"], **settings)
    assert denoising._sample._cache_size() == before


@pytest.mark.parametrize(
    ("text", "guided"),
    [("a cat", False), ("a LAND AND\tsnow", True), ("a cat:1.5", True), ("a GRAND house", False), ("(a:1.5)", False)],
)
def test_weighed_prompts_need_the_negative_side(text, guided):
    assert denoising.guided(generate.job(TextToImage, text, guidance=1.0, grammar="a1111")) is guided
    for guidance in (1.0, 2.0):
        assert denoising.guided(generate.job(TextToImage, text, guidance=guidance)) is (guidance > 1)


def test_words_of_several_vectors_are_rows_of_the_table(sd):
    grown = sd.add_word("<cat>", 2, "cat")
    rows = grown.embed("text_encoder", grown.tokenize(["a <cat>"])["text_encoder"])[0]
    table = trees.flatten(sd.parts["text_encoder"])["text_model.embeddings.token_embedding.embedding"]
    np.testing.assert_array_equal(rows[2:4], np.repeat(table[sd.tokenizers["text_encoder"].ids("cat")[0]][None], 2, 0))
    assert grown.add_word("<cat>", 2) is grown
    with pytest.raises(ValueError, match="knows it with 2 vectors, not 3"):
        grown.add_word("<cat>", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/where/at/all"], "no/where"),
        (["--sampler", "x"], "--sampler='x'"),
        (["--image", "setup.py"], "setup.py"),
    ],
)
def test_command_line_errors_are_one_line(arguments, message, tmp_path):
    command = [
        sys.executable,
        "sample/text2img.py",
        "--model",
        "random:tiny",
        "--prompt",
        "a face",
        "--out",
        str(tmp_path),
        *arguments,
    ]
    env = {**os.environ, "PYTHONPATH": ".", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(lines) == 1 and message in lines[0] and "Traceback" not in done.stderr


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun", "dpmpp_2m"])
def test_pictures_that_are_watched_are_the_same_to_the_bit(sd, sampler):
    seen, settings = [], dict(steps=4, sampler=sampler, seeds=[5, 6], grammar="a1111")
    alone = sdjax.text2img(sd, PROMPTS, **settings)
    watched = sdjax.text2img(sd, PROMPTS, **settings, watch=lambda p: seen.append((p.done, p.steps, p.preview())))
    np.testing.assert_array_equal(alone, watched)
    assert [one[:2] for one in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(one[2].shape == alone.shape for one in seen)


def test_what_is_watched_is_cancelled_within_two_steps(sd, monkeypatch):
    walked, advance = [], denoising._advance
    monkeypatch.setattr(denoising, "_advance", lambda *given: walked.append(1) or advance(*given))
    with pytest.raises(denoising.Cancelled, match="cancelled after 2 of 9 steps"):
        sdjax.text2img(sd, ["a"], steps=9, watch=lambda progress: progress.done == 2)
    assert len(walked) <= 4


def test_bars_belong_to_the_call(sd, capsys):
    sdjax.text2img(sd, ["a"], steps=3, progress=True)
    assert "3/3" in capsys.readouterr().err
