"""Pictures of a dozen of the requests in benchmarks/request_rows.py against thumbnails that are kept; and what compares
all of them between two checkouts.

    make test ARGS="tests/test_same_pictures.py --rewrite"     # keeps the thumbnails of this checkout
    cd CHECKOUT && python -m pytest PATH/tests/test_same_pictures.py -n 0 --rewrite     # of another one

The thumbnails are of commit 3498d3f.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdjax

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import request_rows
import same_pictures
from request_models import Models

FILE, SIDE = Path(__file__).parent / "data" / "same_pictures.png", 32
KEPT = ("ddim normal", "dpmpp_2m karras", "heun sgm_uniform", "euler_a align_your_steps", "weights", "AND", "variation")
KEPT += ("LoRA", "LoHa", "img2img", "ControlNet", "pocket")
ROWS = {request.name: request for request in request_rows.REQUESTS}


@pytest.fixture(scope="module")
def thumbnails(request):
    """{name: uint8 [SIDE SIDE 3]} as they are kept; with --rewrite an empty one that is kept when it has all."""
    if not request.config.getoption("--rewrite"):
        row = np.asarray(Image.open(FILE))
        yield dict(zip(KEPT, np.split(row, len(KEPT), axis=1), strict=True))
        return
    found = {}
    yield found
    Image.fromarray(np.concatenate([found[name] for name in KEPT], axis=1)).save(FILE, optimize=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", KEPT)
def test_pictures_stay_what_they_were(name, models, thumbnails, request):
    with pytest.MonkeyPatch.context() as patch:
        made = same_pictures.make(models, ROWS[name], same_pictures.watch(patch.setattr))[0]
    small = np.asarray(Image.fromarray(made).resize((SIDE, SIDE), Image.Resampling.BOX))
    if request.config.getoption("--rewrite"):
        thumbnails[name] = small
    assert np.abs(small.astype(int) - thumbnails[name]).max() <= 1
    assert small.std() > 20


def test_the_rows_cover_samplers_schedules_and_tasks():
    from sdjax.diffusion import samplers
    from sdjax.diffusion.sigmas import SPACINGS
    from sdjax.sampling.foreign_noise import SOURCES
    from sdjax.text.conditioning import GRAMMARS, WEIGHTINGS

    assert len(ROWS) == len(request_rows.REQUESTS) == 60

    def values(name):
        return {request.settings.get(name) for request in request_rows.REQUESTS} - {None}

    assert values("sampler") == set(samplers.known()) and values("schedule") == {*SPACINGS, "automatic"}
    assert values("grammar") == set(GRAMMARS) - {"plain"} and values("weighting") <= set(WEIGHTINGS)
    assert values("noise_source") == set(SOURCES) - {"jax"}
    tasks = {"text2img", "img2img", "inpaint", "upscale", "super_resolve", "hires", "interpolate"}
    assert {request.task for request in request_rows.REQUESTS} == tasks <= set(sdjax.PUBLIC)


@pytest.mark.parametrize(
    ("today", "wanted"),
    [
        (True, {"negative_prompt": "hat", "clip_skip": 2, "steps": 3, "variation": 0.2, "variation_seed": 7}),
        (False, {"negative": "hat", "skip": 1, "steps": 3, "variation": (7, 0.2)}),
    ],
)
def test_settings_get_the_names_of_the_code_that_is_there(monkeypatch, today, wanted):
    monkeypatch.setattr(same_pictures, "today", lambda: today)
    given = {"negative_prompt": "hat", "clip_skip": 2, "steps": 3, "variation": 0.2, "variation_seed": 7}
    assert same_pictures.spelled(given) == wanted


def test_differences_are_counted_in_255ths(tmp_path, capsys):
    picture, pixels = np.full((1, 2, 2, 3), 9, np.uint8), np.zeros(12, np.float32)
    one = {"a": picture, "pixels of a": pixels, "b": picture - 1, "pixels of b": pixels}
    other = {**one, "pixels of b": pixels + np.float32(1 / 255)}
    for name, arrays in (("one", one), ("other", other)):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    assert same_pictures.compare(tmp_path / "one.npz", tmp_path / "one.npz") == 0
    assert "2 of 2 equal to the bit" in capsys.readouterr().out
    assert same_pictures.compare(tmp_path / "one.npz", tmp_path / "other.npz") == 1
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "equal", "equal"] in said and ["b", "equal", "0.5", "of", "255"] in said
