"""Pictures kept on the device, and batches that other processes prepare: the same batches as without."""

import dataclasses

import numpy as np
import pytest

from sdjax.data import batches, resident, sources
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.settings import SettingError

DATA = Data(path="pocketland", size=32, batch=4, source=Pocketland(count=24), word="*s")


@pytest.fixture(scope="module")
def sd():
    return pipeline.load("random:tiny")


def shown(data, sd, steps=3):
    stream = batches.build(data, sd, 0).iterate(1)
    return [next(stream) for _ in range(steps)]


def same(ours, theirs, **near):
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name == "ids":
            np.testing.assert_array_equal(ours[name]["text_encoder"], theirs[name]["text_encoder"])
        else:
            np.testing.assert_allclose(ours[name], theirs[name], **near)


@pytest.mark.parametrize("encode, concept", [(False, ""), (False, "other"), (True, ""), (True, "same")])
def test_batches_are_those_that_travel(sd, encode, concept):
    data = dataclasses.replace(DATA, encode=encode, concept=concept)
    near = {"rtol": 1e-5, "atol": 1e-5} if encode else {"rtol": 0}
    for ours, theirs in zip(shown(dataclasses.replace(data, resident=True), sd), shown(data, sd), strict=True):
        same(ours, theirs, **near)


def test_some_rows_are_on_the_device_too(sd):
    whole = batches.build(dataclasses.replace(DATA, encode=False, resident=True), sd, 0)
    np.testing.assert_array_equal(whole.of(range(1, 3))[2]["pixels"], whole[2]["pixels"][1:3])


def test_other_processes_make_the_same(sd, tmp_path, monkeypatch):
    data = dataclasses.replace(DATA, encode=False, resident=True, cache=str(tmp_path), workers=2)
    made = shown(data, sd, 5)
    (kept,) = tmp_path.glob("pictures-*.npy")
    assert np.load(kept).shape == (24, 32, 32, 3)
    monkeypatch.setattr(resident, "made", None)  # nothing is drawn again
    for ours, theirs in zip(shown(dataclasses.replace(data, workers=0), sd, 5), made, strict=True):
        same(ours, theirs, rtol=0)


def test_what_cannot_stay_on_the_device_is_refused():
    with pytest.raises(SettingError, match="resident=True: expected False unless crop=center"):
        dataclasses.replace(DATA, resident=True, crop="random")


def test_pictures_of_two_sizes_share_a_run_and_encoders_see_those_of_their_batch(sd):
    """Further pictures have twice the side; all views of a subject have one size."""
    world = Pocketland(count=8, large=8)
    data = dataclasses.replace(DATA, size=128, buckets=2, concept="other", source=world, encode=False)
    made, seen = batches.build(dataclasses.replace(data, resident=True), sd, 0), set()
    assert {shape: list(numbers) for shape, numbers in made.plan.buckets.items()} == {
        (128, 128): list(range(8, 16)), (64, 64): list(range(8))}  # fmt: skip
    for ours, theirs in zip(made.iterate(), batches.build(data, sd, 0).iterate(), strict=False):
        assert ours["pixels"].shape == ours["concept"].shape
        same(ours, theirs, rtol=0)
        seen.add(ours["pixels"].shape[1])
        if seen == {64, 128}:
            break
    with pytest.raises(SettingError, match=r"data.large=8: expected 0, or with it data.buckets=2"):
        batches.build(dataclasses.replace(DATA, source=world), sd, 0)


def test_all_views_of_a_subject_have_one_size():
    world = Pocketland(count=6, large=6)  # the second subject begins among the small ones
    examples = sources.open(dataclasses.replace(DATA, size=128, buckets=2, source=world))
    assert [examples.shape(i)[0] for i in range(12)] == [64] * 8 + [128] * 4
