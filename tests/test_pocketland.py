"""The drawn world: same seed, same picture; words are true; looks differ; the split holds."""

import hashlib
import time

import numpy as np
import pytest
from PIL import Image

from sdjax.data import pocketland


def fingerprint(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def test_worlds_are_functions_of_their_seed():
    assert pocketland.identity(5) == pocketland.identity(5) != pocketland.identity(6)
    assert fingerprint([round(float(x), 5) for x in pocketland.identity(5).vector()]) == "c01cab9c90e7"
    assert fingerprint([pocketland.caption(*pocketland.example(i), i) for i in range(40)]) == "10b0f28df2b8"
    first, again = pocketland.draw(*pocketland.example(9)), pocketland.draw(*pocketland.example(9))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)


def test_pictures_stay_what_they_were():
    """Mean colours of quarters, within 3 of 255: another Pillow may round a polygon's edge differently."""
    pictures = np.stack([pocketland.draw(*pocketland.example(4 * i, cats=0.2)) for i in range(5)]).astype(float)
    quarters = pictures.reshape(5, 2, 32, 2, 32, 3).mean((2, 4)).round().astype(int)
    golden = [
        [203, 211, 212, 206, 214, 217, 190, 189, 191, 188, 190, 194],
        [204, 199, 191, 196, 196, 200, 154, 158, 149, 153, 159, 159],
        [108, 102, 88, 110, 110, 92, 105, 68, 40, 93, 70, 39],
        [49, 47, 60, 39, 37, 54, 100, 85, 66, 85, 75, 66],
        [65, 149, 133, 77, 149, 125, 50, 79, 78, 42, 79, 82],
    ]
    assert np.abs(quarters.reshape(5, -1) - golden).max() <= 3


def test_larger_pictures_show_the_same_in_pixels_of_their_own():
    """Means of 2 x 2 pixels are the small picture; an enlarged small picture is much less sharp."""
    for index in range(0, 48, 4):
        who, place = pocketland.example(index, cats=0.2)
        small, large = pocketland.draw(who, place).astype(float), pocketland.draw(who, place, 128).astype(float)
        assert large.shape == (128, 128, 3)
        assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).mean() < 7  # hatching
        enlarged = np.asarray(Image.fromarray(small.astype(np.uint8)).resize((128, 128), Image.Resampling.BICUBIC))
        edges, blurred = (np.abs(np.diff(x.astype(float), axis=1)).max(-1) for x in (large, enlarged))
        assert np.percentile(edges, 98) > 1.15 * np.percentile(blurred, 98)


@pytest.mark.parametrize("domain", pocketland.DOMAINS)
def test_every_scene_can_be_drawn_and_differs(domain):
    who = pocketland.identity(3, domain)
    pictures = {}
    for context in pocketland.CONTEXTS:
        for style in pocketland.STYLES:
            for accessory in pocketland.ACCESSORIES:
                pictures[context, style, accessory] = pocketland.draw(
                    who, pocketland.scene(1, context, style, accessory)
                ).astype(int)
    plain = pictures["beach", "photo", "none"]
    assert all(
        np.abs(picture - plain).mean() > 1.2 for key, picture in pictures.items() if key != ("beach", "photo", "none")
    )


def test_identities_differ_in_geometry_alone():
    """Same scene, same hair and skin colour: every pair of eight faces differs clearly."""
    model, place = pocketland.identity(0), pocketland.scene(0, "room", "comic", "none")
    people = [pocketland.identity(seed, hair=model, skin=model) for seed in range(100, 108)]
    assert {person.hair for person in people} == {model.hair} and {person.skin for person in people} == {model.skin}
    pictures = [pocketland.draw(person, place).astype(int) for person in people]
    pairs = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(pairs) > 4


def test_vectors_are_standardised():
    vectors = np.stack([pocketland.identity(seed).vector() for seed in range(800)])
    assert np.abs(vectors.mean(0)).max() < 1.2 and 0.4 < vectors.std(0).min() and vectors.std(0).max() < 1.7


def test_captions_name_only_what_is_true():
    with_looks = 0
    for index in range(600):
        who, place = pocketland.example(index)
        words, named = pocketland.caption(who, place, index), pocketland.named(who, place, index)
        true = pocketland.attributes(who, place)
        looks = {kind: word for kind, word in named.items() if kind in pocketland.ATTRIBUTES}
        assert looks.items() <= true.items() and len(looks) <= 4
        assert (named["context"], named["style"], named["accessory"]) == (place.context, place.style, place.accessory)
        assert f" {who.domain}" in words and all(word in words for word in looks.values())
        assert words == words.lower() and words.replace(",", "").replace(" ", "").isalpha()
        said = set(words.replace(",", "").split())
        for kind in ("hair_style", "eye_size", "marks", "beard", "age", "face_shape"):
            assert said & set(pocketland.ATTRIBUTES[kind]) <= {looks.get(kind)} or kind not in looks
        with_looks += bool(looks)
    assert 0.4 < with_looks / 600 < 0.6


def test_every_word_is_said():
    said = {kind: set() for kind in pocketland.ATTRIBUTES}
    for index in range(0, 12000, 4):
        who, place = pocketland.example(index, cats=0.2)
        for kind, word in pocketland.attributes(who, place).items():
            said[kind].add(word)
    assert said == {kind: set(words) for kind, words in pocketland.ATTRIBUTES.items()}


def test_prompts():
    named = {"domain": "face", "style": "watercolor", "context": "beach", "accessory": "hat", "hair_color": "red",
             "hair_style": "short", "skin": "pale"}  # fmt: skip
    expected = "a watercolor painting of a face with short red hair and pale skin wearing a hat on the beach"
    assert pocketland.prompt(named) == expected
    assert (
        pocketland.word_prompt(pocketland.scene(1, "beach", "pencil", "hat"), "*s")
        == "a pencil sketch of *s wearing a hat on the beach"
    )
    with pytest.raises(ValueError, match="context='moon': expected one of beach"):
        pocketland.prompt({"context": "moon"})


def test_unknown_words_are_refused():
    for call in (
        lambda: pocketland.identity(1, "dog"),
        lambda: pocketland.identity(1, hair="violet"),
        lambda: pocketland.scene(1, style="oil"),
    ):
        with pytest.raises(ValueError, match="expected one of"):
            call()
    with pytest.raises(ValueError, match="seed=-1"):
        pocketland.identity(-1)


def test_source():
    source = pocketland.PocketlandSource(400)
    item = source[41]
    other = source[item["other"]]
    assert other["identity"] == item["identity"] and item["other"] != 41 and len(source) == 400
    np.testing.assert_array_equal(item["picture"], pocketland.draw(*pocketland.example(41)))
    assert "*s" in item["word_caption"] and "*s" not in item["caption"]
    cats = [pocketland.example(index)[0].domain == "cat" for index in range(0, 400, 4)]
    assert sum(cats) == 5
    assert pocketland.TRAIN[-1] < pocketland.HELDOUT[0] and pocketland.HELDOUT[-1] < pocketland.VALIDATION[0]


def test_drawing_is_quick():
    start = time.process_time()
    for index in range(60):
        pocketland.draw(*pocketland.example(index))
    assert (time.process_time() - start) / 60 < 0.03
