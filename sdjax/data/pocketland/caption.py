"""Captions for pictures of Pocketland.

caption(person, place, 3)   # "a watercolor of a face with short red hair and pale skin wearing a hat on the beach"
word_prompt(place, "*s")    # "a watercolor painting of *s wearing a hat on the beach"
prompt({"domain": "face", "style": "neon", "context": "space", "hair_color": "blue"})
"""

from collections.abc import Mapping

from sdjax.data.pocketland.world import (
    ACCESSORIES,
    ATTRIBUTES,
    CONTEXTS,
    DOMAINS,
    STYLES,
    Cat,
    Face,
    Scene,
    _pick,
    _random,
    attributes,
    check,
)

STYLE_WORDS = {
    "photo": ("a photo of", "a photograph of"),
    "pencil": ("a pencil sketch of", "a pencil drawing of"),
    "watercolor": ("a watercolor painting of", "a watercolor of"),
    "mosaic": ("a mosaic of", "a tile mosaic of"),
    "neon": ("a neon sign of", "a neon drawing of"),
    "comic": ("a comic book drawing of", "a comic of"),
}
CONTEXT_WORDS = {
    "beach": ("on the beach", "at the beach"),
    "snow": ("in the snow", "in snow"),
    "city": ("in the city at night", "in a city at night"),
    "forest": ("in the forest", "in a forest"),
    "space": ("in space", "in outer space"),
    "desert": ("in the desert", "in a desert"),
    "meadow": ("in a meadow", "in the meadow"),
    "room": ("in a room", "in the room"),
    "mountains": ("in the mountains", "in front of mountains"),
    "underwater": ("underwater", "under water"),
}
ACCESSORY_WORDS = {
    "none": ("",),
    "hat": ("wearing a hat", "with a hat", "in a hat"),
    "glasses": ("wearing glasses", "with glasses"),
    "scarf": ("wearing a scarf", "with a scarf", "in a scarf"),
}


def _looks(named: Mapping[str, str]) -> tuple[list[str], str]:
    """Returns the words of a look: ([words before the noun], the phrase after it)."""
    before = [named[kind] for kind in ("age", "face_shape", "pattern") if kind in named]
    after = []
    if named.get("hair_style") == "bald":
        after.append("a bald head")
    elif "hair_style" in named or "hair_color" in named:
        after.append(" ".join([named[kind] for kind in ("hair_style", "hair_color") if kind in named] + ["hair"]))
    for kinds, noun in ((("skin",), "skin"), (("eye_size", "eye_color"), "eyes"), (("fur",), "fur")):
        words = [named[kind] for kind in kinds if kind in named]
        if words:
            after.append(" ".join([*words, noun]))
    if "marks" in named:
        after.append("freckles")
    if "beard" in named:
        after.append("a " + named["beard"])
    return before, "with " + ", ".join(after[:-1]) + " and " * (len(after) > 1) + after[-1] if after else ""


def prompt(named: Mapping[str, str], seed: int | None = None, subject: str | None = None) -> str:
    """Returns the caption for {kind: word}; every kind is optional.

    named: kinds are domain, style, context, accessory and the kinds of ATTRIBUTES.  seed: chooses among phrasings; None
    takes the first ones.  subject: replaces "a face", such as a learnt word.
    Raises ValueError for an unknown kind or word.
    """
    kinds = {"domain": DOMAINS, "style": STYLES, "context": CONTEXTS, "accessory": ACCESSORIES} | ATTRIBUTES
    for kind, word in named.items():
        check("kind", kind, tuple(kinds))
        check(kind, word, kinds[kind])
    u = [0.0] * 4 if seed is None else [float(number) for number in _random(seed, 4)(4)]
    before, after = _looks(named)
    if subject is None:
        noun = " ".join([*before, named.get("domain", "face")])
        subject = ("an " if noun[0] in "aeiou" else "a ") + noun
    ends = [_pick(u[1], ACCESSORY_WORDS[named.get("accessory", "none")])]
    if "context" in named:
        ends.append(_pick(u[2], CONTEXT_WORDS[named["context"]]))
    if u[3] > 0.5:
        ends.reverse()
    start = _pick(u[0], STYLE_WORDS[named["style"]]) if "style" in named else ""
    return " ".join(part for part in (start, subject, after, *ends) if part)


def _setting(place: Scene) -> dict[str, str]:
    return {"style": place.style, "context": place.context, "accessory": place.accessory}


def caption(who: Face | Cat, place: Scene, seed: int, every: float = 0.0) -> str:
    """Returns a caption with domain, style, context and accessory; half of all captions add one to four attributes.

    every: the share of captions that name all attributes instead.
    """
    return prompt(named(who, place, seed, every), seed)


def named(who: Face | Cat, place: Scene, seed: int, every: float = 0.0) -> dict[str, str]:
    """Returns {kind: word} that `caption` with the same arguments names."""
    u = [float(number) for number in _random(seed, 5)(16)]
    words = {"domain": who.domain, **_setting(place)}
    true = list(attributes(who, place).items())
    if u[15] < every:
        return words | dict(true)
    if u[0] < 0.5:
        return words
    order = sorted(range(len(true)), key=lambda index: u[index + 2])
    return words | dict(true[index] for index in order[: 1 + int(u[1] * 4)])


def word_prompt(place: Scene, word: str, seed: int | None = None) -> str:
    """Returns the caption of a scene with `word` in place of the class noun and no attributes, for personalisation."""
    return prompt(_setting(place), seed, subject=word)
