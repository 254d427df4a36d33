"""An image folder, or one image, as a source: picture i with its prompt, augmented by a generator of its own.

examples = ImageFolder().open(Data(path="photos/cat", word="<cat>", templates="object", crop="random", flip=0.5))
examples.example(0, 512, np.random.default_rng(7))  # {"picture" uint8 [512 512 3], "caption"[, "mask" [512 512]]}
"""

import collections
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.data import prompts
from sdjax.data.sources.source import Examples, Source
from sdjax.images import reading
from sdjax.settings import SettingError

KEPT = 16  # decoded pictures kept: a folder for personalisation is read once
LOOKED_THROUGH = 64  # pictures that are decoded before a model is loaded; of the others the header is read


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder of images with its sub-folders, or one image."""

    def matches(self, path: str) -> bool:
        """Returns whether a path is a folder or an image by its ending or, without one that we know, by its header."""
        place = Path(path)
        if place.is_dir() or (place.is_file() and place.suffix.lower() in reading.SUFFIXES):
            return True
        try:
            return place.is_file() and reading.has_mask(reading.Item(place)) in (True, False)
        except ValueError:
            return False

    def open(self, data: Any) -> Examples:
        """Returns its pictures; raises what Folder does."""
        return Folder(data)


class Folder(Examples):
    """The pictures that a run's Data settings name.

    Raises ValueError for a folder without pictures, pictures without a caption where prompts need one, and data.mask
    where no picture brings a mask.
    """

    def __init__(self, data: Any) -> None:
        self.items, self.passed_over = reading.find(data.path), reading.passed_over(data.path)
        self.crop, self.flip, self.masked = data.crop, data.flip, data.mask
        self.prompts = prompts.make(data.templates, data.word or next((word for _, word in data.words), ""))
        self.words = dict(data.words)
        strange = sorted(self.words.keys() - {item.subject for item in self.items})
        if strange:
            there = ", ".join(sorted({item.subject for item in self.items} - {""})) or "none"
            raise SettingError("data.words", data.words, f"sub-folders of {data.path!r}: {there}, not {strange[0]!r}")
        bare = [item.path for item in self.items if not (item.caption or data.word or item.subject in self.words)]
        if bare and any(prompts.CAPTION in template for template in self.prompts.templates):
            raise ValueError(
                f"{bare[0]} ({len(bare)} of {len(self.items)} pictures): no caption; write one to "
                f"{bare[0].with_suffix('.txt').name}, or set data.word, or data.templates=none"
            )
        if data.mask and not any(reading.has_mask(item) for item in self.items):
            raise ValueError(f"data.mask=True: no picture of data.path={data.path!r} has a clear place or a .mask.png")
        self.subjects = collections.defaultdict(list)
        for i, item in enumerate(self.items):
            self.subjects[item.subject].append(i)
        few = KEPT if len(self.items) <= KEPT else 0
        self._decoded = functools.lru_cache(few)(self._decode)
        self._middle = functools.lru_cache(few)(self._cut)  # one photo is scaled once, not in every row of a batch

    def __len__(self) -> int:
        return len(self.items)

    def epoch(self) -> list[int]:
        """Returns the numbers of an epoch's pictures, each as often as its folder's name says ("10_sks dog")."""
        return [i for i, item in enumerate(self.items) for _ in range(item.times)]

    def about(self) -> str:
        """Returns what there is, in words: "34 pictures, 70 an epoch, 30 captions; passed over: 2 .heic"."""
        shown, texts = len(self.epoch()), sum(bool(item.caption) for item in self.items)
        words = [_counted(len(self), "picture"), *([f"{shown} an epoch"] if shown != len(self) else [])]
        words.append(_counted(texts, "caption"))
        if self.masked:
            words.append(_counted(sum(map(reading.has_mask, self.items)), "mask"))
        left = f"; passed over: {reading.counted(self.passed_over)}" if self.passed_over else ""
        return ", ".join(words) + left

    def _decode(self, i, size):
        return reading.decode(self.items[i], size, self.masked)

    def _cut(self, i, size, place=(0.5, 0.5), flip=False):
        """Returns (a square of picture i, of its mask or None)."""
        picture, mask = self._decoded(i, size)
        cut = functools.partial(reading.square, size=size, place=place, flip=flip)
        return cut(picture), cut(mask).astype(np.float32) / 255 if mask is not None else None

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i, upright."""
        from PIL import Image

        with Image.open(self.items[i].path) as image:
            width, height = image.size
            sideways = image.getexif().get(0x0112) in (5, 6, 7, 8)  # the tag of the orientation
        return (width, height) if sideways else (height, width)

    def picture(self, i: int, size: int) -> np.ndarray:
        """Returns the middle of picture i, uint8 [size size 3]."""
        return self._middle(i, size)[0]

    def caption(self, i: int, random: np.random.Generator) -> str:
        """Returns a prompt for picture i, with the word of its sub-folder where data.words gives one."""
        item = self.items[i]
        word = self.words.get(item.subject, self.prompts.word)
        return replace(self.prompts, word=word)(item.caption, random)

    def other(self, i: int, random: np.random.Generator) -> int:
        """Returns the number of another picture in the same sub-folder; i itself where there is none."""
        subject = self.items[i].subject
        same = self.subjects[subject] if subject else [i]
        step = random.integers(1, len(same)) if len(same) > 1 else 0
        return same[(same.index(i) + step) % len(same)]

    def example(self, i: int, size: int, random: np.random.Generator) -> dict[str, Any]:
        """Returns {"picture", "caption"} of picture i, with data.mask also "mask", float32 [size size] in [0, 1]."""
        x, y, mirror = random.random(3)
        if self.crop == "center" and mirror >= self.flip:
            picture, mask = self._middle(i, size)
        else:
            picture, mask = self._cut(i, size, (x, y) if self.crop == "random" else (0.5, 0.5), mirror < self.flip)
        example = {"picture": picture, "caption": self.caption(i, random)}
        return {**example, "mask": mask} if self.masked else example

    def check(self, size: int) -> None:
        """Decodes the first pictures, and reads the header of the others."""
        for item in self.items[:LOOKED_THROUGH]:
            reading.decode(item, size, self.masked)
        for item in self.items[LOOKED_THROUGH:]:
            reading.has_mask(item)

    def fingerprint(self) -> list[Any]:
        """Returns what decides the pictures, for a cache's name."""
        return ["folder", len(self), reading.digest(self.items)]


def _counted(count, what):
    return f"{count or 'no'} {what}{'s' * (count != 1)}"
