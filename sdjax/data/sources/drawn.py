"""The drawn world as a source: people and cats of Pocketland, with captions drawn with them."""

import hashlib
from pathlib import Path

from sdjax import settings
from sdjax.data import pocketland, prompts

EVERY = 0.5  # of the drawn captions name all there is to see: with few words a small model never ties looks to words

# What the drawn world takes of a folder's settings, and why no more.
PLAIN = {
    "crop": ("center", "pictures are drawn square"),
    "flip": (0, "partings and moles tell people apart"),
    "mask": (False, "pictures are drawn without masks"),
}


class Drawn:
    """`count` pictures of Pocketland's training identities, four scenes each; words are drawn anew every time.

    Raises ValueError for settings of pictures that are cut, mirrored or masked, and templates that do not fit.
    """

    def __init__(self, data, size):
        for name, (accepted, why) in PLAIN.items():
            value = getattr(data, name)
            if value != accepted:
                raise ValueError(f"data.{name}={value!r}: data.path=pocketland accepts {accepted!r}; {why}")
        settings.check(data, "data.", count=settings.FROM_1, domain=("", *pocketland.DOMAINS))
        if data.looks and data.word:
            raise ValueError(f"data.looks=True: with data.word={data.word!r} captions name no looks; accepted is False")
        if data.named and not data.word:
            raise ValueError(f"data.named={data.named}: is for captions with a data.word; accepted without one is 0")
        self.looks, self.named, self.subject = data.looks, data.named, data.domain
        self.source, self.size, self.word = pocketland.PocketlandSource(data.count), size, data.word
        self.prompts = None if data.templates == "captions" else prompts.make(data.templates, data.word)

    def __len__(self):
        return len(self.source)

    def _item(self, i):
        return pocketland.example(i, self.source.views, self.source.cats, self.source.first)

    def picture(self, i):
        """Returns picture i, uint8 [size size 3]."""
        return pocketland.draw(*self._item(i), self.size)

    def caption(self, i, random):
        """Returns a caption of picture i; with a word, one that names the scene and calls the subject by the word.

        With looks, one that names all looks and no scene; with `named`, that share names looks and has no word.
        With templates, one of them with that caption and the word in it.
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
        """Whether a caption names looks though there is a word; draws a number only where `named` asks for it."""
        return bool(self.named) and (random.random() < self.named or self.subject not in ("", who.domain))

    def other(self, i, random):
        """Returns the number of another scene of the same identity."""
        first = i - i % self.source.views
        views = min(self.source.views, len(self) - first)  # the last identity may have fewer
        return first + (i - first + int(random.integers(1, views))) % views if views > 1 else i

    def example(self, i, random):
        """Returns {"picture", "caption"} of picture i."""
        return {"picture": self.picture(i), "caption": self.caption(i, random)}

    def epoch(self):
        """Returns the numbers of an epoch's pictures: each once."""
        return range(len(self))

    def about(self):
        """Returns what there is, in words."""
        return f"{len(self)} drawn pictures"

    def domain(self, i):
        """Returns "face" or "cat": what picture i shows."""
        return self._item(i)[0].domain

    def fingerprint(self):
        """Returns what decides the pictures, for a cache's name."""
        drawing = b"".join(path.read_bytes() for path in sorted(Path(pocketland.__file__).parent.glob("*.py")))
        digest = hashlib.sha256(drawing).hexdigest()
        return ["pocketland", len(self), self.source.views, self.source.cats, self.source.first, digest]


class Only:
    """Some of a source's pictures, by number; `other` must lead to pictures that are among them."""

    def __init__(self, source, numbers):
        self.source, self.numbers = source, list(numbers)
        self.place = {number: i for i, number in enumerate(self.numbers)}

    def __len__(self):
        return len(self.numbers)

    def picture(self, i):
        """Returns picture i, uint8 [S S 3]."""
        return self.source.picture(self.numbers[i])

    def caption(self, i, random):
        """Returns a caption of picture i."""
        return self.source.caption(self.numbers[i], random)

    def other(self, i, random):
        """Returns the number of another picture of the same subject."""
        return self.place[self.source.other(self.numbers[i], random)]

    def example(self, i, random):
        """Returns {"picture", "caption", ...} of picture i."""
        return self.source.example(self.numbers[i], random)

    def epoch(self):
        """Returns the numbers of an epoch's pictures: each once."""
        return range(len(self))

    def about(self):
        """Returns what there is, in words."""
        return f"{len(self)} of {self.source.about()}"


def of_domain(drawn, domain):
    """Returns the numbers of a Drawn source's pictures that show a "face" or a "cat".

    Raises ValueError where there are no such pictures.
    """
    views = drawn.source.views
    firsts = [i for i in range(0, len(drawn), views) if drawn.domain(i) == domain]
    if not firsts:
        raise ValueError(f"data.count={len(drawn)}: none of so few pictures shows a {domain}; take more")
    return [i + k for i in firsts for k in range(views) if i + k < len(drawn)]
