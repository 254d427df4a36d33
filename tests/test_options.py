"""No two samplers, noise schedules or options make the same picture of a small model; numbers compile nothing."""

import itertools

import numpy as np
import pytest
import tiny

import sdjax
from sdjax.diffusion import samplers, sigmas
from sdjax.sampling import denoising
from sdjax.sampling.fields import fields
from sdjax.sampling.settings import Guidance, Noise, TextToImage
from sdjax.service import records

# Every option of its own, euler's picture being the first; each takes the place of what is usual.
OPTIONS = [
    {}, {"guidance": 3.0}, {"guidance": 1.0}, {"rescale": 0.7}, {"guidance_start": 0.3}, {"guidance_end": 0.5},
    {"guidance_start": 0.3, "guidance_end": 0.5}, {"threshold": 0.8, "threshold_limit": 0.5}, {"threshold": 0.9,
    "threshold_limit": 0.5}, {"threshold": 0.8, "threshold_limit": 0.8}, {"churn": 3.0}, {"churn": 2.0},
    {"churn": 3.0, "churn_low": 3.0}, {"churn": 3.0, "churn_high": 3.0}, {"churn": 3.0, "churn_noise": 1.1},
    {"negative_prompt": "red hair"}, {"clip_skip": 2},
    {"steps": 7}, {"seeds": [5]}, {"variation_seed": 3, "variation": 0.2},
    {"noise_source": "torch-cpu"}, {"noise_source": "philox"}, {"noise_source": "philox", "churn": 3.0},
    {"noise_source": "philox", "churn": 3.0, "ensd": 5}, {"grammar": "a1111"}, {"grammar": "comfyui"},
]  # fmt: skip


# Pairs of schedules that their origins define to be the same times but for rounding or the last level: these pictures
# differ, by 1 of 255.
NEAR = {
    "euler": [("sgm_uniform", "simple")],
    "dpmpp_2m": [("normal", "sgm_uniform"), ("normal", "simple"), ("sgm_uniform", "simple")],
    "ddim": [("ddim_uniform", "normal"), ("sgm_uniform", "simple")],
}


@pytest.fixture(scope="module")
def sd():
    return tiny.model()


def picture(sd, **options):
    settings = {"steps": 8, "seeds": [4], "sampler": "euler", "guidance": 6.0} | options
    return sdjax.text2img(sd, ["a (photo:1.4) of a face"], **settings)[0].astype(int)


def closest(made, near=()):
    """Returns (largest difference of 255, names) of the two pictures that differ least; of pairs in `near`, 1 is 2."""
    pairs = itertools.combinations(sorted(made), 2)
    return min((int(np.abs(made[a] - made[b]).max()) + ((a, b) in near), a, b) for a, b in pairs)


def test_no_two_samplers_make_the_same_picture(sd):
    made = {name: picture(sd, sampler=name) for name in samplers.known()}
    print("CLOSEST samplers", closest(made))
    assert closest(made)[0] > 1


@pytest.mark.parametrize("sampler", NEAR)
def test_no_two_noise_schedules_make_the_same_picture(sd, sampler):
    made = {name: picture(sd, sampler=sampler, schedule=name) for name in sigmas.SPACINGS}
    print("CLOSEST schedules", sampler, closest(made), [closest({a: made[a], b: made[b]}) for a, b in NEAR[sampler]])
    assert closest(made, NEAR[sampler])[0] > 1


@pytest.mark.parametrize("count", [20, pytest.param(len(OPTIONS), marks=pytest.mark.slow)])
def test_no_two_options_make_the_same_picture(sd, count):
    made = {str(options): picture(sd, **options) for options in OPTIONS[:count]}
    print("CLOSEST options", closest(made))
    assert closest(made)[0] > 1


def test_numbers_compile_nothing(sd):
    kinds = [
        {"guidance": 2.0, "guidance_start": 0.2, "guidance_end": 0.7, "rescale": 0.1},
        {"threshold": 0.7, "threshold_limit": 2.0, "guidance_end": 0.9},
        {"churn": 1.0, "churn_low": 1.0, "churn_high": 5.0, "churn_noise": 0.9, "steps": 11},
    ]
    for options in ({}, {"threshold": 0.9}, {"churn": 3.0}):
        picture(sd, **options)
    before = denoising._sample._cache_size()
    for options in kinds:
        picture(sd, **options)
    assert denoising._sample._cache_size() == before


def test_records_keep_them():
    numbers = [name for part in (Guidance, Noise) for name, one in fields(part).items() if one.kind is float]
    options = {**dict.fromkeys(numbers, 0.25), "guidance_end": 0.75}
    record = records.of(TextToImage(prompt="a", **options), (32, 32))
    assert records.parse(records.text(record)).settings.items() >= options.items() and len(numbers) > 8
    plain = records.text(records.of(TextToImage(prompt="a"), (32, 32)))
    assert not [name for name in numbers if fields(TextToImage)[name].about.word in plain]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_end=0.5: guidance_start=0.5; expected 0 <= start"),
        ({"threshold": 1.5}, "threshold=1.5"), ({"threshold_limit": 0.0}, "threshold_limit=0.0"),
        ({"churn": 1.0, "sampler": "lms"}, "churn=1.0: lms has none"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(sd, options, message):
    with pytest.raises(ValueError, match=message):
        picture(sd, **options)
