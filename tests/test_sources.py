"""What a run is shown: captions of the drawn world, templates, and settings that a source refuses."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from sdjax.data import batches, pocketland, sources
from sdjax.data.batches import Data
from sdjax.data.sources import folder
from sdjax.data.sources.drawn import Pocketland, of_domain
from sdjax.formats import pipeline
from sdjax.images import reading
from sdjax.stable_diffusion import to_pictures

DATA = Data(path="pocketland", size=32, batch=4, source=Pocketland(count=16))


def drawn(count=16, domain="", looks=False, named=0.0, **changes):
    world = Pocketland(count=count, domain=domain, looks=looks, named=named)
    return sources.open(dataclasses.replace(DATA, source=world, **changes))


def test_templates_are_for_the_drawn_world_too(tmp_path):
    captions = [drawn().caption(i, np.random.default_rng(i)) for i in range(8)]
    assert all(" face " in f"{words} " for words in captions)
    portraits = {drawn(templates="face", word="*s").caption(0, np.random.default_rng(i)) for i in range(40)}
    assert {"a photo of *s", "a portrait of *s"} <= portraits and len(portraits) > 10
    (tmp_path / "lines.txt").write_text("look: [filewords]\n")
    lined = drawn(templates=str(tmp_path / "lines.txt"))
    assert [lined.caption(i, np.random.default_rng(i)) for i in range(8)] == [f"look: {words}" for words in captions]
    assert drawn(templates="none").caption(0, np.random.default_rng(0)) == ""
    with pytest.raises(ValueError, match="data.word=''"):
        drawn(templates="object")


def test_captions_of_looks_name_all_of_them_and_no_scene():
    source = drawn(looks=True)
    for i in range(8):
        who, place = source._item(i)
        words = source.caption(i, np.random.default_rng(i))
        assert all(word in words for word in pocketland.attributes(who, place).values())
        assert words == pocketland.prompt({"domain": who.domain, **pocketland.attributes(who, place)})


def test_a_share_of_captions_names_looks_in_place_of_the_word():
    count = 200  # one identity in twenty is a cat
    plain, half = (drawn(count=count, word="*s", domain="face", named=share) for share in (0.0, 0.5))
    words = [half.caption(i, np.random.default_rng(i)) for i in range(count)]
    faces = [i for i in range(count) if half.domain(i) == "face"]
    assert len(faces) == count - 8
    assert 0.4 < np.mean(["*s" in words[i] for i in faces]) < 0.6
    assert all("*s" not in words[i] and "cat" in words[i] for i in set(range(count)) - set(faces))
    same = [plain.caption(i, np.random.default_rng(i)) for i in range(count)]
    assert all(words[i] == same[i] for i in faces if "*s" in words[i])  # and nothing else of the stream moves


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(flip=0.5), "data.flip=0.5: expected 0 for data.path=pocketland"),
        (dict(crop="random"), "data.crop='random': expected 'center' for data.path=pocketland"),
        (dict(mask=True), "data.mask=True: expected False for data.path=pocketland"),
        (dict(templates="fase", word="*s"), "data.templates='fase'"),
        (dict(count=0), "count=0: expected a number from 1"),
        (dict(path="."), r"data.source=Pocketland\(.*\): expected one for data.path='.'; None takes that path's own"),
        (dict(looks=True, word="*s"), "data.looks=True: expected False with data.word='\\*s'"),
        (dict(named=0.5), "data.named=0.5: expected 0 without a data.word"),
        (dict(domain="dog"), "domain='dog': expected one of '', face, cat"),
    ],
)
def test_sources_refuse_what_is_not_for_them(changes, message):
    with pytest.raises(ValueError, match=message):
        drawn(**changes)


def test_a_domain_without_pictures_is_refused():
    with pytest.raises(ValueError, match="data.count=16: expected more pictures; none of so few shows a cat"):
        of_domain(drawn(), "cat")


def test_the_one_picture_that_an_encoder_looks_at_is_not_augmented(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    data = dataclasses.replace(DATA, source=None, path=str(tmp_path / "a.png"), word="*s", flip=1.0)
    single = batches.build(data, pipeline.load("random:tiny"), 0).single
    np.testing.assert_array_equal(to_pictures(single), picture)


def test_one_photo_is_scaled_once(tmp_path, monkeypatch):
    """And not in each of 16 rows at every step, nor is its mirror image; what is cut at random is cut anew."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)).save(tmp_path / "a.png")
    cuts, square, sd = [], reading.cut, pipeline.load("random:tiny")
    monkeypatch.setattr(reading, "cut", lambda *inputs, **how: cuts.append(how) or square(*inputs, **how))
    for changes, least, most in (({}, 1, 1), ({"flip": 0.5}, 2, 2), ({"crop": "random"}, 16, 18)):
        cuts.clear()
        data = Data(path=str(tmp_path / "a.png"), size=32, batch=8, word="*s", **changes)
        made = batches.build(data, sd, 0)
        for step in range(2):
            batch = made[step]
        assert ("moments" in batch) != ("pixels" in batch)  # one of them is enough for the loss
        assert least <= len(cuts) <= most


def test_broken_pictures_are_found_whatever_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "LOOKED_THROUGH", 1)
    for i in range(3):
        Image.fromarray(np.full((20, 20, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    some = sources.open(Data(path=str(tmp_path), word="a"))
    some.check(32)
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="2.png"):
        some.check(32)
