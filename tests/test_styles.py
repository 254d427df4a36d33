"""Prompt styles: A1111's file, its rules, the API that lists them and requests that name them."""

import asyncio

import pytest

from sdjax.service import styles
from sdjax.web import a1111_words

TABLE = (
    'name,prompt,negative_prompt\nink,"an ink drawing of {prompt}, fine lines",colour\n'
    '---- light ----,,\ndawn,"soft light, mist",\n'
)


def test_a1111s_file_and_its_rules(tmp_path):
    assert styles.read(tmp_path / "none.csv") == {}
    path = tmp_path / "styles.csv"
    path.write_text(TABLE, encoding="utf-8-sig")
    found = styles.read(path)
    assert list(found) == ["ink", "dawn"]
    both = styles.applied([found["ink"], found["dawn"]], "a cat", "blurry")
    assert both == ("an ink drawing of a cat, fine lines, soft light, mist", "blurry, colour")
    assert styles.applied([found["dawn"]], "", "") == ("soft light, mist", "")
    path.write_text("name,text\nold,a {prompt}\n")  # before 1.0
    assert styles.applied([styles.read(path)["old"]], "cat", "") == ("a cat", "")
    for bad in (b"a,b\n1,2\n", b"\xff\xfe", b"x" * (styles.MOST + 1)):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="styles.csv: "):
            styles.read(path)


def test_requests_name_styles(tmp_path):
    (tmp_path / "styles.csv").write_text(TABLE)
    known = styles.read(tmp_path / "styles.csv")

    def asked(**body):
        return asyncio.run(a1111_words.of_body("txt2img", {"prompt": "a cat", **body}, {}, None, (), known))

    made = asked(styles=["ink", "other"], enable_hr=True, hr_prompt="a dog")
    assert made.values["prompt"] == "an ink drawing of a cat, fine lines" and made.values["negative_prompt"] == "colour"
    assert made.values["hires_prompt"] == "an ink drawing of a dog, fine lines"
    assert "hires_negative_prompt" not in made.values
    assert made.styles == ["ink"] and made.notes == ["styles has no 'other'"]
    plain = asked(styles=[])
    assert plain.values["prompt"] == "a cat" and not plain.notes
