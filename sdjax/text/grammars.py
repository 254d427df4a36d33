"""Grammars of prompts: adapters, AND, scheduled texts, weights.

    text, wanted = adapters("a [cat:dog:0.5] (on snow:1.3) AND night :0.5 <lora:ink:0.8>", {"lora": "lora"})
    (first, 1.0), (second, 0.5) = parts(text)
    (10, before), (20, after) = timeline(first, steps=20)
    emphasis(after)                                             # (("a dog ", 1.0), ("on snow", 1.3))

Sources: AUTOMATIC1111's stable-diffusion-webui 1.10, prompt_parser and extra_networks, and ComfyUI's sd1_clip: their
behaviour, constants and published examples.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdjax.settings import shown

ROUND, SQUARE = 1.1, 1 / 1.1  # factor of a pair of brackets, the same in all of these tools
DEPTH = 100  # most levels of nested brackets
WORK = 1_000_000  # most parts of a text that brackets weight, in total
BREAK = ("BREAK", -1.0)


@dataclass(frozen=True)
class Wanted:
    """An adapter that a prompt names by <tag:name:strength>.

    kind: the tag's kind of adapter.  unet: the UNet's strength if it differs from the text encoder's.
    """

    kind: str
    name: str
    strength: float = 1.0
    unet: float = 1.0


ADAPTER = re.compile(r"<(\w{1,100}):([^>]{1,1000})>")  # bounded, so that every text is quick


def adapters(text: str, tags: Mapping[str, str]) -> tuple[str, tuple[Wanted, ...]]:
    """Returns (text without its adapter tags, a Wanted for each <lora:name:w>, <hypernet:name:w>, ... in order).

    tags: {tag: kind of adapter}, from the formats: {"lora": "lora", "lyco": "lora", ...}.
    <lora:name:0.8> sets both strengths; <lora:name:0.8:0.5> and <lora:name:te=0.8:unet=0.5> set the text encoder's and
    the UNet's.  A name is not a path; the caller looks it up.
    Raises ValueError for an unknown tag and for a strength that is not a number.
    """
    return ADAPTER.sub("", text), tuple(_adapter(match, tags) for match in ADAPTER.finditer(text))


def expected(tags: Mapping[str, str]) -> str:
    """Returns the accepted forms of adapters, for messages: "<lora:name:strength> or <hypernet:name:strength>"."""
    return " or ".join(f"<{kind}:name:strength>" for kind in dict.fromkeys(tags.values()))


def _adapter(match: re.Match[str], tags: Mapping[str, str]) -> Wanted:
    tag, (name, *values) = match[1], match[2].split(":")
    if tag not in tags:
        raise ValueError(f"{shown(match[0])}: expected {expected(tags)}")
    named = dict(value.split("=", 1) for value in values if "=" in value)
    places = [value for value in values if "=" not in value]
    strength = named.pop("te", places[0] if places else "1")
    unet = named.pop("unet", places[1] if len(places) > 1 else strength)
    if named or len(places) > 2:
        raise ValueError(f"{shown(match[0])}: expected at most two strengths, te and unet")
    return Wanted(tags[tag], name, _number(strength, match[0]), _number(unet, match[0]))


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{shown(where)}: {shown(text)} is no number")
    return value


NUMBER = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")


def parts(text: str) -> tuple[tuple[str, float], ...]:
    """Returns the texts joined by AND, with their weights: "a AND b :0.5" gives (("a", 1.0), ("b", 0.5))."""
    found = []
    for part in re.split(r"\bAND\b", text):
        words, _, number = part.rpartition(":")
        weight = ":" in part and NUMBER.fullmatch(number.strip())
        found.append((words.rstrip(), float(number)) if weight else (part.rstrip(), 1.0))
    return tuple(found)


def weighed(text: str) -> bool:
    """Returns whether a prompt has AND or a weight at its end ("a cat:1.5"), which need a negative prompt."""
    return [weight for _, weight in parts(text)] != [1.0]


def timeline(text: str, steps: int, before: int | None = None) -> tuple[tuple[int, str], ...]:
    """Returns the texts of a run with the last step of each, ((step, text), ...); steps count from 1.

    A number with a point is a fraction of `steps`, one without is a step; the options of [a|b] alternate.  A text whose
    brackets do not fit this grammar stays unchanged.
    before: steps of the first pass, if this is the second.  Then step numbers include the first pass, and fractions of
    the second pass start at 1.
    Raises ValueError for brackets nested deeper than DEPTH.
    """
    tree = _tree(text)
    if tree is None:
        return ((steps, text),)

    def bound(number: str) -> int:
        offset = 0 if before is None else 1 if "." in number else before
        return min(steps, int((float(number) - offset) * (steps if "." in number else 1)))

    ends = {steps}
    for node in _nodes(tree):
        ends |= set(range(1, steps + 1)) if isinstance(node, _Turns) else {bound(node.number)}
    return tuple((step, _text(tree, step, bound)) for step in sorted(ends) if step >= 1)


@dataclass(frozen=True)
class _Change:
    before: list[Any]
    after: list[Any]
    number: str


@dataclass(frozen=True)
class _Turns:
    options: list[list[Any]]


LETTERS = re.compile(r"(?:[^\\\[\]():|]|\\.)+")
UNTIL = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\]")


def _tree(text: str) -> list[Any] | None:
    """Returns the text as a list of texts, lists, _Changes and _Turns; None if it does not fit the grammar.

    Unpaired brackets and colons are letters; a bar outside of square brackets does not fit.
    """
    items, at = [], 0
    while True:
        more, at = _sequence(text, at, 0)
        items += more
        if at == len(text):
            return items
        if text[at] not in "[]():":
            return None
        items.append(text[at])
        at += 1


def _sequence(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    """Returns (items, their end): letters and pairs of brackets from `at` on."""
    items = []
    while at < len(text):
        letters = LETTERS.match(text, at)
        if letters:
            items.append(letters[0])
            at = letters.end()
            continue
        pair = _pair(text, at, depth + 1) if text[at] in "([" else None
        if pair is None:
            break
        items.append(pair[0])
        at = pair[1]
    return items, at


def _pair(text: str, at: int, depth: int) -> tuple[Any, int] | None:
    """Returns (item, its end) for the brackets that open at `at`, or None if they are unpaired."""
    if depth > DEPTH:
        raise ValueError(f"prompt {text[:20]!r}...: brackets nested deeper than {DEPTH}")
    first, end = _sequence(text, at + 1, depth)
    if text[at] == "(":
        items = ["(", first]
        if text.startswith(":", end):
            second, end = _sequence(text, end + 1, depth)
            items += [":", second]
        return ([*items, ")"], end + 1) if text.startswith(")", end) else None
    if text.startswith("|", end):
        options = [first]
        while text.startswith("|", end):
            option, end = _sequence(text, end + 1, depth)
            options.append(option)
        return (_Turns(options), end + 1) if text.startswith("]", end) else None
    if text.startswith(":", end):
        before, after, until = [], first, UNTIL.match(text, end + 1)
        if not until:
            before, (after, end) = first, _sequence(text, end + 1, depth)
            until = UNTIL.match(text, end + 1) if text.startswith(":", end) else None
        return (_Change(before, after, until[1]), until.end()) if until else None
    return (["[", first, "]"], end + 1) if text.startswith("]", end) else None


def _nodes(item: Any) -> Iterator[_Change | _Turns]:
    """Yields the _Changes and _Turns of a tree, including nested ones."""
    if isinstance(item, _Change):
        yield item
        item = [item.before, item.after]
    elif isinstance(item, _Turns):
        yield item
        item = item.options
    if isinstance(item, list):
        for inner in item:
            yield from _nodes(inner)


def _text(item: Any, step: int, bound: Callable[[str], int]) -> str:
    """Returns the text of a tree at a step."""
    if isinstance(item, str):
        return item
    if isinstance(item, _Change):
        item = item.before if step <= bound(item.number) else item.after
    elif isinstance(item, _Turns):
        item = item.options[(step - 1) % len(item.options)]
    return "".join(_text(inner, step, bound) for inner in item)


WEIGHTS = re.compile(r"\\[()\[\]\\]?|[(\[)\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")


def emphasis(text: str) -> tuple[tuple[str, float], ...]:
    """Returns A1111's ((text, weight), ...); the text BREAK starts a new chunk.

    An unclosed bracket extends to the end of the text; an unopened one is a letter.
    Raises ValueError for a weight such as 1.2.3, and for brackets that weight more than WORK parts in total.
    """
    found, opened, left = [], {"(": [], "[": []}, WORK

    def close(bracket, factor):
        nonlocal left
        inside = found[opened[bracket].pop() :]
        left -= len(inside)
        if left < 0:
            raise ValueError(f"prompt {text[:20]!r}...: too many brackets within brackets")
        for pair in inside:
            pair[1] *= factor

    for match in WEIGHTS.finditer(text):
        piece, number = match[0], match[1]
        if piece[0] == "\\":
            found.append([piece[1:], 1.0])
        elif piece in opened:
            opened[piece].append(len(found))
        elif number and opened["("]:
            close("(", _number(number, piece))
        elif piece == ")" and opened["("]:
            close("(", ROUND)
        elif piece == "]" and opened["["]:
            close("[", SQUARE)
        else:
            first, *others = re.split(r"\bBREAK\b", piece)
            found.append([first.rstrip() if others else first, 1.0])
            for i, other in enumerate(others, 1):
                found += [list(BREAK), [other.strip() if i < len(others) else other.lstrip(), 1.0]]
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for _ in list(opened[bracket]):
            close(bracket, factor)
    return tuple(_joined(found))


def _joined(pairs: Iterable[Sequence[Any]]) -> list[tuple[str, float]]:
    """Returns the pairs with neighbours of equal weight joined."""
    joined = []
    for text, weight in pairs:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


def comfy_emphasis(text: str, weight: float = 1.0) -> tuple[tuple[str, float], ...]:
    """Returns ComfyUI's ((text, weight), ...): a number replaces the weight around it, plain brackets multiply it."""
    hidden = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    return tuple((t.replace("\0\1", ")").replace("\0\2", "("), w) for t, w in _comfy(hidden, weight, 0))


def _comfy(text: str, weight: float, depth: int) -> list[tuple[str, float]]:
    if depth > DEPTH:
        raise ValueError(f"prompt {text[:20]!r}...: brackets nested deeper than {DEPTH}")
    found = []
    for piece in _comfy_pieces(text):
        if len(piece) >= 2 and piece[0] == "(" and piece[-1] == ")":
            inside, inner = piece[1:-1], weight * ROUND
            head, colon, number = inside.rpartition(":")
            if colon and head:
                try:
                    inside, inner = (head, float(number)) if math.isfinite(float(number)) else (inside, inner)
                except ValueError:
                    pass  # the colon belongs to the text
            found += _comfy(inside, inner, depth + 1)
        else:
            found.append((piece, weight))
    return found


def _comfy_pieces(text: str) -> list[str]:
    """Returns the text cut before and after its outermost pairs of round brackets."""
    pieces, start, depth = [], 0, 0
    for i, letter in enumerate(text):
        if letter == "(":
            if depth == 0:
                pieces.append(text[start:i])
                start = i
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                pieces.append(text[start : i + 1])
                start = i + 1
    return [piece for piece in (*pieces, text[start:]) if piece]
