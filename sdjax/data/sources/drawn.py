"""The drawn world as a source: people and cats of Pocketland with generated captions."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdjax import settings
from sdjax.data import pocketland, prompts
from sdjax.data.sources.source import Examples, Size, Source
from sdjax.settings import SettingError

EVERY = 0.5  # share of captions that name all attributes: from short captions a small model never learns the words

ANY = 1 << 12  # side in pixels, above every run's: pictures are drawn at the size that is asked for

# The only values that the drawn world accepts for these settings, and why.
PLAIN = {
    "crop": ("center", "pictures are drawn square"),
    "flip": (0, "partings and moles tell people apart"),
    "mask": (False, "pictures are drawn without masks"),
    "words": ((), "there are no sub-folders"),
}


@dataclass(frozen=True)
class Pocketland(Source):
    """The drawn world, data.path=pocketland.

    count: number of pictures.  domain: draw only "face" or only "cat".
    large: additional pictures with the side data.size; the others then have half of it.  Needs data.buckets=2.
    looks: captions name all looks and no scene.
    named: fraction of captions that name looks instead of the word; if above 0, captions of other domains always do.
    """

    count: int = 60000
    domain: str = ""
    looks: bool = False
    named: float = 0.0
    large: int = 0
    square = True

    def __post_init__(self):
        settings.check(
            self, count=settings.FROM_1, large=settings.FROM_0, domain=("", *pocketland.DOMAINS), named=settings.TO_1
        )

    def matches(self, path: str) -> bool:
        """Returns whether a path is "pocketland"."""
        return path == "pocketland"

    def open(self, data: Any) -> Examples:
        """Returns the drawn pictures; raises what Drawn does."""
        return Drawn(self, data)


class Drawn(Examples):
    """`count` pictures of Pocketland's training identities, four scenes each; every visit draws another caption.

    Raises SettingError for settings that crop, mirror or mask pictures, and for templates that do not fit.
    """

    def __init__(self, world: Pocketland, data: Any) -> None:
        for name, (accepted, why) in PLAIN.items():
            value = getattr(data, name)
            if value != accepted:
                raise SettingError(name, value, f"{accepted!r} for data.path=pocketland; {why}")
        if data.maker is not None and data.maker.endings:
            raise SettingError("condition", data.condition, "one that is made of the picture for data.path=pocketland")
        if world.looks and data.word:
            raise SettingError("looks", True, f"False with data.word={data.word!r}, whose captions name no looks")
        if world.named and not data.word:
            raise SettingError("named", world.named, "0 without a data.word")
        if world.large and (data.buckets < 2 or data.size % 2 or data.size < 2 * pocketland.SIZE):
            wanted = f"0, or with it data.buckets=2 and an even data.size from {2 * pocketland.SIZE} on"
            raise SettingError("large", world.large, wanted)
        self.looks, self.named, self.subject = world.looks, world.named, world.domain
        self.source, self.word = pocketland.PocketlandSource(world.count + world.large), data.word
        self.first_large, self.largest = world.count, data.size
        self.prompts = None if data.templates == "captions" else prompts.make(data.templates, data.word)

    def __len__(self) -> int:
        return len(self.source)

    def _item(self, i):
        return pocketland.example(i, self.source.views, self.source.cats, self.source.first)

    def shape(self, i: int) -> tuple[int, int]:
        """Returns the size of picture i, ANY without `large`; all pictures of an identity have that of its first."""
        if len(self) == self.first_large:
            return ANY, ANY
        side = self.largest if i - i % self.source.views >= self.first_large else self.largest // 2
        return side, side

    def picture(self, i: int, size: Size) -> np.ndarray:
        """Returns picture i, uint8 [size size 3]."""
        return pocketland.draw(*self._item(i), int(np.max(size)))

    def caption(self, i: int, random: np.random.Generator) -> str:
        """Returns a caption of picture i.

        With a word the caption names the scene and calls the subject by the word.  With `looks` it names all looks and
        no scene.  `named` is the fraction of captions that name looks instead of the word.  A template is filled with
        that caption and the word.
        """
        who, place = self._item(i)
        seed = int(random.integers(1 << 31))
        if self.word and not self._named(who, random):
            words = pocketland.word_prompt(place, self.word, seed)
        elif self.looks:
            words = pocketland.prompt({"domain": who.domain, **pocketland.attributes(who, place)}, seed)
        else:
            words = pocketland.caption(who, place, seed, EVERY)
        return self.prompts(words, random) if self.prompts else words

    def _named(self, who, random):
        """Returns whether a caption names looks instead of the word; draws a random number only if `named` is set."""
        return bool(self.named) and (random.random() < self.named or self.subject not in ("", who.domain))

    def other(self, i: int, random: np.random.Generator) -> int:
        """Returns the number of another scene of the same identity."""
        first = i - i % self.source.views
        views = min(self.source.views, len(self) - first)  # the last identity may have fewer
        return first + (i - first + int(random.integers(1, views))) % views if views > 1 else i

    def chosen(self) -> Sequence[int] | None:
        """Returns the numbers of the domain's pictures; None for all, also if captions name the other domains."""
        return of_domain(self, self.subject) if self.subject and not self.named else None

    def epoch(self) -> Sequence[int]:
        """Returns the numbers of an epoch's pictures: each one once."""
        return range(len(self))

    def about(self) -> str:
        """Returns a short summary: "60000 drawn pictures"."""
        return f"{len(self)} drawn pictures"

    def domain(self, i: int) -> str:
        """Returns the subject of picture i, "face" or "cat"."""
        return self._item(i)[0].domain

    def content(self, i: int) -> str:
        """Returns a text that identifies picture i and the code that draws it."""
        return json.dumps([self.source.views, self.source.cats, self.source.first + i, self._drawing()])

    def fingerprint(self) -> list[Any]:
        """Returns plain values that identify the pictures, for a cache's name."""
        return ["pocketland", len(self), self.source.views, self.source.cats, self.source.first, self._drawing()]

    def _drawing(self):
        """Returns a digest of the drawing code."""
        return _code(Path(pocketland.__file__).parent)


@functools.lru_cache(maxsize=2)
def _code(folder: Path) -> str:
    """Returns a digest of a package's code, read once per process."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()


def of_domain(drawn: Drawn, domain: str) -> list[int]:
    """Returns the numbers of the drawn pictures of a domain, "face" or "cat".

    Raises SettingError if there are none.
    """
    views = drawn.source.views
    firsts = [i for i in range(0, len(drawn), views) if drawn.domain(i) == domain]
    if not firsts:
        raise SettingError("data.count", len(drawn), f"more pictures; none of so few shows a {domain}")
    return [i + k for i in firsts for k in range(views) if i + k < len(drawn)]
