"""The grammar of prompts against the examples that its makers publish and against its definition, case by case."""

import pytest

from sdjax.text.grammars import DEPTH, Wanted, adapters, comfy_emphasis, emphasis, parts, timeline, weighed


def alternating(*texts, steps=10):
    return [(step, texts[(step - 1) % len(texts)]) for step in range(1, steps + 1)]


# Examples of stable-diffusion-webui's own documentation, and cases derived from its grammar; ten steps.
TAGS = {"lora": "lora", "lyco": "lora", "hypernet": "hypernet"}
SCHEDULES = {
    "test": [(10, "test")],
    "": [(10, "")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [b:3 ]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "a [{b|d{:.5] c": [(10, "a [{b|d{:.5] c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": alternating("a", "(b:1.1)"),
    "[fe|]male": alternating("female", "male"),
    "[fe|||]male": alternating("female", "male", "male", "male"),
    "[a:b:0.5]": [(5, "a"), (10, "b")],
    "[a:b:0.25] x": [(2, "a x"), (10, "b x")],
    "[a::0.6]": [(6, "a"), (10, "")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:5.]": [(10, "a")],
    "[a:b:0]": [(10, "b")],
    "[a:b:-1]": [(10, "b")],
    "[a:b:30]": [(10, "a")],
    "[a:3:4]": [(4, "a"), (10, "3")],
    "[a:b\n:3]": [(3, "a"), (10, "b\n")],
    "[a:b:3 x]": [(10, "[a:b:3 x]")],
    "[a:b:c:3]": [(10, "[a:b:c:3]")],
    "\\[a:b:3\\]": [(10, "\\[a:b:3\\]")],
    "[a\\:b:c:3]": [(3, "a\\:b"), (10, "c")],
    "a|b [c:3]": [(10, "a|b [c:3]")],
    "(a [b:c:3]:1.2)": [(3, "(a b:1.2)"), (10, "(a c:1.2)")],
    "[[a|b]:c:2] d": [(1, "a d"), (2, "b d"), *[(step, "c d") for step in range(3, 11)]],
    "[a:b:3][c:d:6]": [(3, "ac"), (6, "bc"), (10, "bd")],
}


@pytest.mark.parametrize("text", SCHEDULES)
def test_schedules(text):
    assert list(timeline(text, 10)) == SCHEDULES[text]


def test_the_long_example():
    text = "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
    text += "[ in foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]"
    assert [end for end, _ in timeline(text, 100)] == [25, 50, 60, 75, 100]
    assert dict(timeline(text, 100))[60] == (
        "fantasy landscape with a lake and an oak in foreground in background masterful"
    )


def test_a_second_pass_goes_on_where_the_first_ended():
    assert timeline("a [b:.5] c", 10, before=10) == ((10, "a b c"),)
    assert timeline("a [b:1.5] c", 10, before=10) == ((5, "a  c"), (10, "a b c"))
    assert timeline("[a:b:13]", 10, before=10) == ((3, "a"), (10, "b"))


# The webui's documented examples first.
WEIGHTS = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "\\(literal\\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.3 * 1.1**2),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.5 * 1.1),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
    "": [("", 1.0)],
    "a:1.3": [("a:1.3", 1.0)],
    "a:1.3)": [("a:1.3)", 1.0)],
    "(a: 1.3 )": [("a", 1.3)],
    "(a:-0.5)": [("a", -0.5)],
    "(a:b)": [("a:b", 1.1)],
    "[a:1.3]": [("a:1.3", 1 / 1.1)],
    "a) b]": [("a) b]", 1.0)],
    "(a\\)": [("a)", 1.1)],
    "\\\\(a)": [("\\", 1.0), ("a", 1.1)],
    "a BREAK b": [("a", 1.0), ("BREAK", -1.0), ("b", 1.0)],
    "a BREAKs b": [("a BREAKs b", 1.0)],
}


@pytest.mark.parametrize("text", WEIGHTS)
def test_weights(text):
    found = emphasis(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in WEIGHTS[text]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in WEIGHTS[text]])


# ComfyUI's documented examples first.
COMFY = {
    "(foo)": [("foo", 1.1)],
    "(foo)(bar)": [("foo", 1.1), ("bar", 1.1)],
    "(foo:2.0)": [("foo", 2.0)],
    "((foo))": [("foo", 1.21)],
    "((foo):1.1)": [("foo", 1.21)],
    "((foo:1.1))": [("foo", 1.1)],
    "(foo:0.0)": [("foo", 0.0)],
    "((foo:1.0):0.0)": [("foo", 1.0)],
    "foo ((((lol (cat:666) attack:100)))) baz": [
        ("foo ", 1.0),
        ("lol ", 100.0),
        ("cat", 666.0),
        (" attack", 100.0),
        (" baz", 1.0),
    ],
    "foo ((((lol (cat:666) attack):100))) baz": [
        ("foo ", 1.0),
        ("lol ", 110.0),
        ("cat", 666.0),
        (" attack", 110.0),
        (" baz", 1.0),
    ],
    "[a] {b}": [("[a] {b}", 1.0)],
    "\\(a\\) (b)": [("(a) ", 1.0), ("b", 1.1)],
    "(a:b)": [("a:b", 1.1)],
    "(:1.2)": [(":1.2", 1.1)],
    "(open": [("(open", 1.0)],
    "shut) (a)": [("shut) (a)", 1.0)],
    "": [],
}


@pytest.mark.parametrize("text", COMFY)
def test_weights_of_comfyui(text):
    found = comfy_emphasis(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in COMFY[text]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in COMFY[text]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a AND b", [("a", 1.0), (" b", 1.0)]),
        ("a :1.2 AND b:0.5 ", [("a", 1.2), (" b", 0.5)]),
        ("a:-.5 AND b : 2.", [("a", -0.5), (" b", 2.0)]),
        ("ANDROID AND SAND", [("ANDROID", 1.0), (" SAND", 1.0)]),
        ("(a:1.2) AND [b:c:0.5]", [("(a:1.2)", 1.0), (" [b:c:0.5]", 1.0)]),
        ("a:1.5", [("a", 1.5)]),
        ("a\nb :3 AND", [("a\nb", 3.0), ("", 1.0)]),
    ],
)
def test_several_at_once(text, expected):
    assert list(parts(text)) == expected
    assert weighed(text) == (expected[0][1] != 1 or len(expected) > 1)


@pytest.mark.parametrize(
    ("text", "rest", "expected"),
    [
        ("a <lora:ink:0.8> b", "a  b", [Wanted("lora", "ink", 0.8, 0.8)]),
        ("<lora:ink>", "", [Wanted("lora", "ink")]),
        ("<lora:a b-c.d_v1:1:0.5>", "", [Wanted("lora", "a b-c.d_v1", 1.0, 0.5)]),
        ("<lora:x:te=0.3:unet=0.4>", "", [Wanted("lora", "x", 0.3, 0.4)]),
        ("<lyco:x:unet=2>", "", [Wanted("lora", "x", 1.0, 2.0)]),
        ("x<hypernet:h:0.5><lora:l:-1>", "x", [Wanted("hypernet", "h", 0.5, 0.5), Wanted("lora", "l", -1.0, -1.0)]),
        ("a <cat-toy> 1 < 2: 3 > 2", "a <cat-toy> 1 < 2: 3 > 2", []),
    ],
)
def test_adapters(text, rest, expected):
    assert adapters(text, TAGS) == (rest, tuple(expected))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adapters("<lorra:ink:1>", TAGS), "<lorra:ink:1>.*expected <lora:name:strength>"),
        (lambda: adapters("<lora:ink:strong>", TAGS), "'strong' is no number"),
        (lambda: adapters("<lora:ink:nan>", TAGS), "'nan' is no number"),
        (lambda: adapters("<lora:ink:1:1:8>", TAGS), "at most two strengths"),
        (lambda: adapters("<lora:ink:dyn=8>", TAGS), "at most two strengths"),
        (lambda: emphasis("(a:1.2.3)"), "'1.2.3' is no number"),
        (lambda: timeline("[" * 200, 10), "nested deeper than 100"),
        (lambda: comfy_emphasis("(" * 200 + ")" * 200), "nested deeper than 100"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_many_brackets_without_a_pair_take_no_time():
    text = "a (b [c " * 30 + "[d:e:0.5]"
    assert timeline(text, 10)[1][1].endswith("e") and len(emphasis("(" * 5000 + "a")) == 1
    assert DEPTH > 60
