"""What changes in a prompt each time: shuffled and dropped tags, kept ones, prefixes, choices; by seed and place."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.tags import chosen, varied
from sdjax.formats import pipeline
from sdjax.settings import SettingError

TAGS = "sks, red hat, beach, night, smile"


def seen(prompt, count=200, **settings):
    data = Data(**settings)
    return [varied(prompt, data, np.random.default_rng(i)) for i in range(count)]


def test_without_settings_a_prompt_stays():
    assert set(seen(" a,b ,  {x|y} ")) == {" a,b ,  {x|y} "}


def test_shuffled_tags_behind_those_that_are_kept():
    texts = seen(TAGS, shuffle=True, keep=2)
    assert all(text.startswith("sks, red hat, ") for text in texts)
    assert {tuple(sorted(text.split(", "))) for text in texts} == {tuple(sorted(TAGS.split(", ")))}
    assert len(set(texts)) == 6
    assert len(set(seen(TAGS, shuffle=True))) > 50


def test_dropped_tags():
    texts = seen(TAGS, tag_dropout=0.5, keep=1)
    kept = np.mean([len(text.split(", ")) - 1 for text in texts])
    assert kept == pytest.approx(2, abs=0.2) and all(text.split(", ")[0] == "sks" for text in texts)
    assert set(seen(TAGS, tag_dropout=1.0, keep=1)) == {"sks"}
    order = TAGS.split(", ")
    assert all(
        [order.index(tag) for tag in text.split(", ")] == sorted(map(order.index, text.split(", "))) for text in texts
    )


def test_choices_and_a_prefix():
    texts = seen("a {red|{dark|light} blue|} hat", wildcards=True, prefix="<cat>")
    assert set(texts) == {f"<cat> a {colour} hat" for colour in ("red", "dark blue", "light blue", "")}
    assert set(seen("", prefix="x")) == {"x"}
    assert chosen("{no bar} {", np.random.default_rng(0)) == "{no bar} {"


def test_a_batch_depends_on_seed_and_place_alone(tmp_path):
    for i in range(2):
        Image.new("RGB", (32, 32), (90 * i, 9, 9)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(TAGS)
    sd = pipeline.load("random:tiny")
    data = Data(path=str(tmp_path), size=32, batch=4, shuffle=True, tag_dropout=0.3, prefix="photo", dropout=0.2)
    whole = batches.build(data, sd, 0)
    stream = [next(whole.iterate(n)) for n in range(3)]
    again = [batch for _, batch in zip(range(3), batches.build(data, sd, 0).iterate(), strict=False)]
    for one, other in zip(stream, again, strict=True):
        np.testing.assert_array_equal(one["ids"]["text_encoder"], other["ids"]["text_encoder"])
    ids = np.concatenate([batch["ids"]["text_encoder"] for batch in stream])
    assert len(np.unique(ids, axis=0)) > 6
    assert not np.array_equal(stream[0]["ids"]["text_encoder"], batches.build(data, sd, 1)[0]["ids"]["text_encoder"])
    plain = batches.build(dataclasses.replace(data, shuffle=False, tag_dropout=0.0, prefix="", dropout=0.0), sd, 0)[0]
    assert len(np.unique(plain["ids"]["text_encoder"], axis=0)) == 1


def test_settings_that_cannot_be():
    with pytest.raises(SettingError, match="tag_dropout=1.5"):
        Data(tag_dropout=1.5)
    with pytest.raises(SettingError, match="keep=-1"):
        Data(keep=-1)
