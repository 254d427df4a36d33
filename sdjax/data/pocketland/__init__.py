"""Pocketland: the drawn world of the embedded model.  Faces and cats in ten places, six styles and four accessories.

Needs only numpy and Pillow.  Every picture is a pure function of whole-number seeds: there is no end of them, and no
licence restricts them.

    who, place = pocketland.identity(7), pocketland.scene(11, style="comic")
    pixels = pocketland.draw(who, place)                     # uint8 [64 64 3]
    words = pocketland.caption(who, place, 11)
    PocketlandSource(60_000)[5]["picture"]                   # the data that the embedded model is trained on

Identities: seeds below 10,000,000 (`TRAIN`) may be trained on, `VALIDATION` is for choosing between models, `HELDOUT`
is for final figures.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdjax.data.pocketland.background import BACKGROUNDS
from sdjax.data.pocketland.canvas import SIZE, Canvas
from sdjax.data.pocketland.caption import caption, named, prompt, word_prompt
from sdjax.data.pocketland.cat import draw_cat
from sdjax.data.pocketland.face import draw_face
from sdjax.data.pocketland.world import (
    ABSENT,
    ACCESSORIES,
    ATTRIBUTES,
    CONTEXTS,
    DOMAINS,
    HELDOUT,
    STYLES,
    TRAIN,
    VALIDATION,
    Cat,
    Face,
    Scene,
    attributes,
    identity,
    labels,
    scene,
)

__all__ = [
    "ABSENT",
    "ACCESSORIES",
    "ATTRIBUTES",
    "CONTEXTS",
    "DOMAINS",
    "HELDOUT",
    "STYLES",
    "TRAIN",
    "VALIDATION",
    "Cat",
    "Face",
    "PocketlandSource",
    "Scene",
    "attributes",
    "caption",
    "draw",
    "example",
    "identity",
    "labels",
    "named",
    "prompt",
    "scene",
    "word_prompt",
]
WORD = "*s"  # the learnt word in captions for personalisation


def draw(who: Face | Cat, place: Scene, size: int = SIZE) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the picture of an identity in a scene, uint8 [size size 3].

    Sizes from 64 on are drawn in their own pixels; smaller ones are resampled from 64.
    """
    canvas = Canvas(place.style, max(size, SIZE))
    canvas.dim = 0.62 if place.style == "neon" else 1.0
    BACKGROUNDS[place.context](canvas, place.layout)
    canvas.end_background()
    if isinstance(who, Face):
        draw_face(canvas, who, place)
    else:
        draw_cat(canvas, who, place)
    picture = canvas.finish(place)
    if size >= SIZE:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


def example(index: int, views: int = 4, cats: float = 0.05, first: int = 0) -> tuple[Face | Cat, Scene]:
    """Returns (identity, scene) number `index` of the training data: each identity has `views` scenes in a row.

    cats: share of identities that are cats, evenly spread, all others are faces; first: the first identity's seed.
    """
    number = index // views
    cat = int((number + 1) * cats) > int(number * cats)
    return identity(first + number, "cat" if cat else "face"), scene(first * views + index)


@dataclass(frozen=True)
class PocketlandSource:
    """A data source of `count` drawn examples: len() and [index], as grain's MapDataset.source takes it.

    An item is a dict.  picture: uint8 [64 64 3].  caption: all words.  word_caption: with "*s" for the subject.
    identity: its seed.  other: the index of another view of the same identity.
    """

    count: int
    views: int = 4
    cats: float = 0.05
    first: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        who, place = example(index, self.views, self.cats, self.first)
        return {"picture": draw(who, place), **self.words(index, who, place)}

    def words(self, index: int, who: Face | Cat | None = None, place: Scene | None = None) -> dict[str, Any]:
        """Returns an item without its picture, which is what takes time."""
        if who is None or place is None:
            who, place = example(index, self.views, self.cats, self.first)
        start, step = index - index % self.views, 1 + place.seed * 7919 % max(1, self.views - 1)
        return {
            "caption": caption(who, place, place.seed),
            "word_caption": word_prompt(place, WORD, place.seed),
            "identity": who.seed,
            "other": start + (index - start + step) % self.views,
        }
