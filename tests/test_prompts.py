"""Templates, and prompts drawn from them."""

import numpy as np
import pytest

from sdjax.data import prompts


def draw(made, count=400, caption=""):
    return [made(caption, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize(
    ("name", "count", "different"),
    [("object", 27, 27), ("style", 19, 17), ("normal", 10, 10), ("face", 16, 16), ("art", 12, 12)],
)
def test_lists_are_as_published(name, count, different):
    lines = prompts.TEMPLATES[name]
    assert (len(lines), len(set(lines))) == (count, different)
    assert all(line.count("[name]") == 1 and line == line.strip() for line in lines)


def test_lists_hold_what_the_papers_show():
    assert prompts.OBJECT[0] == "a photo of a [name]" and prompts.OBJECT[-1] == "a photo of a small [name]"
    assert (
        prompts.STYLE[0] == "a painting in the style of [name]"
        and "a rendition in the style of [name]" in prompts.STYLE
    )
    assert prompts.FACE[:10] == prompts.NORMAL and prompts.FACE[-1] == "photo realistic portrait of [name]"
    assert prompts.ART[-2:] == ("art of [name]", "art by [name]")


def test_a_prompt_is_a_function_of_its_generator_and_every_template_is_drawn():
    made = prompts.make("object", "<cat>")
    assert draw(made) == draw(made)
    assert {p.replace("<cat>", "[name]") for p in draw(made, 600)} == set(prompts.OBJECT)


def test_captions_are_themselves_and_the_word_where_there_is_none():
    made = prompts.make("captions", "a sks cat")
    assert made("a cat on a sofa", np.random.default_rng(0)) == "a cat on a sofa"
    assert made("[name] on a sofa", np.random.default_rng(0)) == "a sks cat on a sofa"
    assert made("", np.random.default_rng(0)) == "a sks cat"


@pytest.mark.parametrize(
    ("template", "word", "text"),
    [
        ("a photo of a [name]", "a cat", "a photo of a cat"),
        ("a photo of the [name]", "the cat", "a photo of the cat"),
        ("a photo of a nice [name]", "an owl", "a photo of a nice owl"),
        ("a photo of [name]", "a cat", "a photo of a cat"),
        ("art by [name]", "the master", "art by the master"),
        ("[name] on the beach", "a cat", "a cat on the beach"),
        ("a photo of a [name]", "a", "a photo of a a"),
        ("a photo of a [name]", "<a b>", "a photo of a <a b>"),
        ("a photo of a [name]", r"\1 c\g<0>", r"a photo of a \1 c\g<0>"),
        ("[filewords], by [name]", "<s>", "a boat, by <s>"),
    ],
)
def test_fill(template, word, text):
    assert prompts.fill(template, word, "a boat") == text


def test_a_template_file_is_read_line_by_line(tmp_path):
    (tmp_path / "t.txt").write_text(
        "\ufeffa painting of [filewords], art by [name]\n\n  [filewords] \n", encoding="utf-8"
    )
    made = prompts.make(str(tmp_path / "t.txt"), "<s>")
    assert set(draw(made, 50, "a boat")) == {"a painting of a boat, art by <s>", "a boat"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a photo\n", "no line holds [name] or [filewords]"),
        (b"", "no line holds"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[name]" * 20000, "longer than"),
    ],
)
def test_bad_template_files_are_refused(tmp_path, content, words):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        prompts.make(str(tmp_path / "t.txt"), "x")
    assert words in str(error.value) and "t.txt" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("objects", "cat"), "data.templates='objects': expected captions, trigger, none, object"),
        (("object", ""), "data.word=''"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError) as error:
        prompts.make(*arguments)
    assert words in str(error.value)
