"""Identities (faces and cats) and scenes of Pocketland, each a pure function of its seed.

Needs only numpy.  An identity is a frozen dataclass of numbers in [0, 1]; a scene holds everything that varies between
pictures of the same identity.  `labels` returns the true words of a picture, with a dead band between opposite words.

    person = identity(7)                          # a face; identity(7, "cat") for a cat
    place = scene(11, context="beach")
    attributes(person, place)                     # {"hair_color": "red", "skin": "pale", ...}

Identities are split by seed into training and held-out ones; scenes need no split.
"""

import colorsys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float32, Float64

T = TypeVar("T")

TRAIN = range(0, 10_000_000)  # identities for training
HELDOUT = range(10_000_000, 20_000_000)  # identities for the final figures only
VALIDATION = range(20_000_000, 30_000_000)  # identities for choosing between trained judges or models

DOMAINS = ("face", "cat")
CONTEXTS = ("beach", "snow", "city", "forest", "space", "desert", "meadow", "room", "mountains", "underwater")
STYLES = ("photo", "pencil", "watercolor", "mosaic", "neon", "comic")
ACCESSORIES = ("none", "hat", "glasses", "scarf")
ATTRIBUTES = {
    "hair_color": ("black", "brown", "blond", "red", "white", "pink", "green", "blue"),
    "hair_style": ("bald", "short", "long", "curly", "spiky"),
    "skin": ("pale", "tan", "dark"),
    "eye_color": ("brown", "green", "blue"),
    "eye_size": ("small", "big"),
    "face_shape": ("round", "narrow"),
    "beard": ("beard", "moustache"),
    "marks": ("freckles",),
    "age": ("old",),
    "fur": ("orange", "grey", "black", "white", "brown"),
    "pattern": ("striped", "masked"),
}
ABSENT = "absent"  # label of a kind that is clearly missing: no beard, no freckles, plain fur

# (lowest, highest) hue, saturation and lightness of each family; within a family the colour is continuous.
HAIR = {
    "black": ((0.58, 0.70), (0.10, 0.25), (0.04, 0.10)),
    "brown": ((0.05, 0.075), (0.50, 0.62), (0.20, 0.27)),
    "blond": ((0.12, 0.145), (0.75, 0.90), (0.58, 0.66)),
    "red": ((0.01, 0.035), (0.80, 0.95), (0.42, 0.48)),
    "white": ((0.55, 0.62), (0.04, 0.10), (0.82, 0.92)),
    "pink": ((0.88, 0.92), (0.70, 0.90), (0.64, 0.72)),
    "green": ((0.33, 0.42), (0.50, 0.75), (0.34, 0.44)),
    "blue": ((0.59, 0.63), (0.65, 0.85), (0.42, 0.52)),
}
FUR = {
    "orange": ((0.06, 0.08), (0.75, 0.90), (0.50, 0.58)),
    "grey": ((0.58, 0.64), (0.05, 0.12), (0.48, 0.56)),
    "black": ((0.60, 0.70), (0.08, 0.20), (0.10, 0.15)),
    "white": ((0.10, 0.14), (0.20, 0.40), (0.90, 0.95)),
    "brown": ((0.05, 0.07), (0.42, 0.55), (0.24, 0.32)),
}
IRIS = {"brown": ((0.06, 0.09), (0.65, 0.85), (0.26, 0.36)), "green": ((0.32, 0.40), (0.70, 0.9), (0.36, 0.46)),
        "blue": ((0.56, 0.61), (0.80, 0.95), (0.50, 0.62))}  # fmt: skip
SKIN = {"pale": (0.0, 0.17), "tan": (0.38, 0.56), "dark": (0.80, 1.0)}


@dataclass(frozen=True)
class Face:
    """A person: floats are in [0, 1] unless noted; `hair` and `iris` are RGB in [0, 1]."""

    seed: int
    head_width: float
    head_height: float
    jaw: float  # 0 square, 1 pointed
    forehead: float  # 0 narrow, 1 broad
    skin: float  # 0 palest, 1 darkest
    undertone: float
    hair_color: str
    hair: tuple[float, float, float]
    hair_style: str
    hair_length: float
    hair_volume: float
    hairline: float  # 0 low fringe, 1 high forehead
    parting: float
    eye_size: float
    eye_open: float
    eye_spacing: float
    eye_height: float
    eye_tilt: float
    eye_color: str
    iris: tuple[float, float, float]
    lid: float
    brow_thickness: float
    brow_tilt: float
    brow_gap: float
    nose_length: float
    nose_width: float
    mouth_width: float
    mouth_height: float
    mouth_rest: float  # corners down .. up at rest
    lip: float
    lip_color: float
    ears: float
    blush: float
    freckles: float  # 0, or 0.5 .. 1
    mole_size: float  # 0, or 0.5 .. 1
    mole_x: float
    mole_y: float
    beard: str  # absent, beard, moustache
    beard_size: float
    age: float  # below 0.5 no wrinkles
    domain: Literal["face"] = "face"

    def vector(self) -> Float32[np.ndarray, " 47"]:
        """Returns the identity as float32 [47], standardised to about zero mean and unit variance."""
        return _vector(self, ("skin", "age"), {"hair_style": ATTRIBUTES["hair_style"], "beard": ATTRIBUTES["beard"]})


@dataclass(frozen=True)
class Cat:
    """A cat's head: floats are in [0, 1]; `coat`, `second` and `iris` are RGB in [0, 1]."""

    seed: int
    head_width: float
    head_height: float
    cheek: float
    fur: str
    coat: tuple[float, float, float]
    second: tuple[float, ...]
    pattern: str  # absent, striped, masked
    pattern_size: float
    ear_size: float
    ear_width: float
    ear_spread: float
    eye_size: float
    eye_open: float
    eye_spacing: float
    eye_height: float
    eye_tilt: float
    iris: tuple[float, float, float]
    muzzle: float
    muzzle_tone: float
    nose: float
    nose_color: float
    whiskers: float
    domain: Literal["cat"] = "cat"

    def vector(self) -> Float32[np.ndarray, " 28"]:
        """Returns the identity as float32 [28], standardised to about zero mean and unit variance."""
        return _vector(self, (), {"pattern": ATTRIBUTES["pattern"]})


@dataclass(frozen=True)
class Scene:
    """Everything that differs between pictures of one identity.  Floats are in [-1, 1] unless noted."""

    seed: int
    context: str
    style: str
    accessory: str
    x: float
    y: float
    scale: float
    tilt: float
    yaw: float
    smile: float
    mouth_open: float  # 0 closed, 1 open
    gaze: float
    brightness: float
    warmth: float
    item_color: float  # hue of hat, glasses or scarf, 0 .. 1
    item_shape: float  # 0 .. 1
    cloth: float  # hue of the shirt, 0 .. 1
    layout: tuple[float, ...]  # 12 numbers in [0, 1] that place the background's things


def _vector(who: Face | Cat, wide: Collection[str], choices: Mapping[str, Sequence[str]]) -> Float32[np.ndarray, " N"]:
    numbers = []
    for field in fields(who):
        value = getattr(who, field.name)
        if field.name in choices:
            numbers += [2.0 * (value == word) - 0.4 for word in choices[field.name]]
        elif isinstance(value, tuple):
            numbers += [(channel - 0.4) / 0.28 for channel in value]
        elif isinstance(value, float):
            numbers.append((value - 0.5) / (0.36 if field.name in wide else 0.29))
    return np.asarray(numbers, np.float32)


def _random(seed: int, salt: int) -> Callable[[int], Float64[np.ndarray, " n"]]:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}: expected a whole number from 0 to 2**63 - 1")
    return np.random.Generator(np.random.PCG64([salt, seed])).random


def _pick(number: float, items: Sequence[T]) -> T:
    return items[min(int(number * len(items)), len(items) - 1)]


def _color(family: Sequence[tuple[float, float]], u: Sequence[float]) -> tuple[float, float, float]:
    """Returns the RGB in [0, 1] of a family ((h, h), (s, s), (l, l)) at u [3]."""
    hue, saturation, lightness = (low + (high - low) * float(t) for (low, high), t in zip(family, u, strict=True))
    return colorsys.hls_to_rgb(hue, lightness, saturation)


def check(name: str, value: str, accepted: Collection[str]) -> None:
    """Raises ValueError naming the setting when value is not one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(accepted)}")


def identity(
    seed: int, domain: str = "face", hair: str | Face | None = None, skin: str | Face | None = None
) -> Face | Cat:
    """Returns the identity of a seed, a Face or a Cat.

    hair, skin: for faces, a family's word ("red", "pale"), or another Face to copy the exact hair colour or skin tone
    from; everything else still follows the seed.
    Raises ValueError for an unknown domain or family and for a negative seed.
    """
    check("domain", domain, DOMAINS)
    return _face(seed, hair, skin) if domain == "face" else _cat(seed)


def _face(seed: int, hair: str | Face | None, skin: str | Face | None) -> Face:
    u = [float(number) for number in _random(seed, 1)(64)]
    color, rgb = _pick(u[0], ATTRIBUTES["hair_color"]), None
    if isinstance(hair, Face):
        color, rgb = hair.hair_color, hair.hair
    elif hair is not None:
        check("hair", hair, tuple(HAIR))
        color = hair
    family, tone, undertone = _pick(u[4], tuple(SKIN)), None, u[6]
    if isinstance(skin, Face):
        tone, undertone = skin.skin, skin.undertone
    elif skin is not None:
        check("skin", skin, tuple(SKIN))
        family = skin
    low, high = SKIN[family]
    if tone is None:
        tone = u[5] if u[7] < 0.15 and skin is None else low + (high - low) * u[5]
    eye = _pick(u[8], tuple(IRIS))
    beard = "beard" if u[12] < 0.17 else "moustache" if u[12] < 0.32 else ABSENT
    style = "bald" if u[13] < 0.1 else _pick((u[13] - 0.1) / 0.9, ("short", "long", "curly", "spiky"))
    return Face(
        seed=seed, skin=tone, undertone=undertone, hair_color=color, hair=rgb or _color(HAIR[color], u[1:4]),
        hair_style=style, eye_color=eye, iris=_color(IRIS[eye], u[9:12]), beard=beard, beard_size=u[14],
        freckles=0.5 + u[15] if u[16] < 0.2 else 0.0, mole_size=0.5 + u[17] / 2 if u[18] < 0.35 else 0.0,
        age=u[19], head_width=u[20], head_height=u[21], jaw=u[22], forehead=u[23], hair_length=u[24],
        hair_volume=u[25], hairline=u[26], parting=u[27], eye_size=u[28], eye_open=u[29], eye_spacing=u[30],
        eye_height=u[31], eye_tilt=u[32], lid=u[33], brow_thickness=u[34], brow_tilt=u[35], brow_gap=u[36],
        nose_length=u[37], nose_width=u[38], mouth_width=u[39], mouth_height=u[40], mouth_rest=u[41], lip=u[42],
        lip_color=u[43], ears=u[44], blush=u[45], mole_x=u[46], mole_y=u[47],
    )  # fmt: skip


def _cat(seed: int) -> Cat:
    u = [float(number) for number in _random(seed, 2)(40)]
    fur = _pick(u[0], ATTRIBUTES["fur"])
    coat = _color(FUR[fur], u[1:4])
    pattern = _pick(u[4], (ABSENT, *ATTRIBUTES["pattern"]))
    dark = 0.299 * coat[0] + 0.587 * coat[1] + 0.114 * coat[2] < 0.25
    second = tuple(c + (0.92 - c) * 0.55 for c in coat) if dark else tuple(c * 0.45 for c in coat)
    return Cat(
        seed=seed, fur=fur, coat=coat, second=second, pattern=pattern,
        iris=_color(((0.12, 0.58), (0.8, 0.95), (0.5, 0.62)), u[5:8]), pattern_size=u[8], head_width=u[9],
        head_height=u[10], cheek=u[11], ear_size=u[12], ear_width=u[13], ear_spread=u[14], eye_size=u[15],
        eye_open=u[16], eye_spacing=u[17], eye_height=u[18], eye_tilt=u[19], muzzle=u[20], muzzle_tone=u[21],
        nose=u[22], nose_color=u[23], whiskers=u[24],
    )  # fmt: skip


def scene(seed: int, context: str | None = None, style: str | None = None, accessory: str | None = None) -> Scene:
    """Returns the scene of a seed; the seed also decides context, style and accessory if they are None.

    Raises ValueError for an unknown context, style or accessory.
    """
    for name, value, accepted in (
        ("context", context, CONTEXTS), ("style", style, STYLES), ("accessory", accessory, ACCESSORIES),
    ):  # fmt: skip
        if value is not None:
            check(name, value, accepted)
    u = [float(number) for number in _random(seed, 3)(28)]
    v = [2 * number - 1 for number in u]
    return Scene(
        seed=seed, context=context or _pick(u[0], CONTEXTS), style=style or _pick(u[1], STYLES),
        accessory=accessory or _pick(u[2], ACCESSORIES), x=v[3], y=v[4], scale=v[5], tilt=v[6], yaw=v[7], smile=v[8],
        mouth_open=max(0.0, v[9] * 2 - 1), gaze=v[10], brightness=v[11], warmth=v[12], item_color=u[13],
        item_shape=u[14], cloth=u[15], layout=tuple(u[16:28]),
    )  # fmt: skip


def head_size(who: Face | Cat) -> tuple[float, float]:
    """Returns half the width and half the height of the head in pixels of a 64-pixel picture at scale 1."""
    if who.domain == "cat":
        return 13.0 + 4.5 * who.head_width, 10.5 + 3.5 * who.head_height
    return 11.0 + 5.5 * who.head_width, 13.5 + 5.5 * who.head_height


def _side(value: float, low: float, high: float, words: Sequence[str]) -> str | None:
    """Returns words[0] below `low`, words[1] above `high`, and None in the dead band between."""
    return words[0] if value < low else words[1] if value > high else None


def labels(who: Face | Cat, place: Scene) -> dict[str, str | None]:
    """Returns {kind: word, ABSENT or None} for every kind of ATTRIBUTES: None if it is unclear or not visible.

    For example, glasses hide the colour of the eyes, and a hat hides the length of most hair.
    """
    said = dict.fromkeys(ATTRIBUTES)
    hat, glasses, scarf = (place.accessory == word for word in ("hat", "glasses", "scarf"))
    fine = place.style not in ("mosaic", "neon")
    if who.domain == "cat":
        return said | {"fur": who.fur, "pattern": None if hat else who.pattern}
    visible_hair = who.hair_style in ("long", "curly") or not hat
    if who.hair_style != "bald" and visible_hair:
        said["hair_color"] = who.hair_color
    if visible_hair and (who.hair_style != "long" or who.hair_length > 0.25):
        said["hair_style"] = who.hair_style
    said["skin"] = next((word for word, (low, high) in SKIN.items() if low <= who.skin <= high), None)
    if fine and not glasses and who.eye_size > 0.3:
        said["eye_color"] = who.eye_color
    if not glasses and place.style != "mosaic":
        said["eye_size"] = _side(who.eye_size, 0.22, 0.78, ATTRIBUTES["eye_size"])
    width, height = head_size(who)
    if not (hat or scarf) and who.beard != "beard":
        said["face_shape"] = _side(height / width, 1.04, 1.42, ATTRIBUTES["face_shape"])
    if not (scarf and who.beard == "beard"):
        said["beard"] = who.beard
    if fine and not glasses:
        said["marks"] = "freckles" if who.freckles else ABSENT
        if place.style != "watercolor" and not hat:
            said["age"] = _side(who.age, 0.5, 0.75, (ABSENT, "old"))
    return said


def attributes(who: Face | Cat, place: Scene) -> dict[str, str]:
    """Returns {kind: word} of everything that a caption of this picture may name, in the order of ATTRIBUTES."""
    return {kind: word for kind, word in labels(who, place).items() if word not in (None, ABSENT)}
