"""An image folder, or one image, as a source: picture i with its prompt, augmented by a generator of its own.

examples = ImageFolder().open(Data(path="photos/cat", word="<cat>", templates="object", crop="random", flip=0.5))
examples.example(0, 512, np.random.default_rng(7))  # {"picture" uint8 [512 512 3], "caption"[, "mask" [512 512]]}

A condition that files hold (data.condition=files, openpose, ...) lies beside its picture, or under the picture's name
in data.condition_folder; it is cut and mirrored with the picture.
"""

import collections
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data import prompts
from sdjax.data.sources.source import Examples, Size, Source
from sdjax.images import captions, reading
from sdjax.settings import SettingError

KEPT = 16  # decoded pictures kept: a folder for personalisation is read once
LOOKED_THROUGH = 64  # pictures that are decoded before a model is loaded; of the others the header is read


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder of images with its sub-folders, or one image.

    condition_folder: where the files of conditions lie, as NAME.png or as beside the pictures; "" for beside them.
    """

    condition_folder: str = ""

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
        return Folder(data, self.condition_folder)


class Folder(Examples):
    """The pictures that a run's Data settings name.

    Raises ValueError for a folder without pictures, pictures without a caption where prompts need one, data.mask where
    no picture brings a mask, and for pictures without the file of their condition.
    """

    def __init__(self, data: Any, condition_folder: str = "") -> None:
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
        self.maker = data.maker if data.maker is not None and data.maker.endings else None
        self.conditions = _conditions(self.items, data, condition_folder) if self.maker else ()
        self.subjects = collections.defaultdict(list)
        for i, item in enumerate(self.items):
            self.subjects[item.subject].append(i)
        few = KEPT if len(self.items) <= KEPT else 0
        self._content = functools.cache(lambda i: reading.digest([self.items[i]]))
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
        picture, mask = reading.decode(self.items[i], int(np.max(size)), self.masked)
        return picture, mask, self._condition(i)

    def _condition(self, i):
        """Returns the condition of picture i that a file holds, an image; None where no file does."""
        if self.maker is None:
            return None
        full, file = self.shape(i), self.conditions[i]
        found = self.maker.read(file, full)
        if abs(found.shape[0] * full[1] - found.shape[1] * full[0]) > max(full):  # more than a pixel of rounding
            sides = [f"{width} x {height}" for height, width in (found.shape[:2], full)]
            raise ValueError(f"{file}: {sides[0]} pixels; expected the proportions of the picture's {sides[1]}")
        return Image.fromarray(found)

    def _cut(self, i, size, place=(0.5, 0.5), flip=False):
        """Returns {"picture"[, "mask"][, "condition"]} of the part of picture i with the proportions of `size`."""
        picture, mask, condition = self._decoded(i, size)
        cut = functools.partial(reading.cut, size=size, place=place, flip=flip)
        found = {"picture": cut(picture)}
        if mask is not None:
            found["mask"] = cut(mask).astype(np.float32) / 255
        return found if condition is None else {**found, "condition": cut(condition)}

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i, upright."""
        return reading.shape(self.items[i].path)

    def picture(self, i: int, size: Size) -> np.ndarray:
        """Returns the middle of picture i, uint8 [h w 3]."""
        return self._middle(i, size)["picture"]

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

    def example(self, i: int, size: Size, random: np.random.Generator) -> dict[str, Any]:
        """Returns {"picture", "caption"} of picture i, with data.mask also "mask", float32 [h w] in [0, 1].

        Of a condition that files hold also "condition", uint8 [h w 3].
        """
        x, y, mirror = random.random(3)
        if self.crop == "center" and mirror >= self.flip:
            found = self._middle(i, size)
        else:
            found = self._cut(i, size, (x, y) if self.crop == "random" else (0.5, 0.5), mirror < self.flip)
        return {**found, "caption": self.caption(i, random)}

    def check(self, size: int) -> None:
        """Decodes the first pictures, and reads the header of the others."""
        for i, item in enumerate(self.items[:LOOKED_THROUGH]):
            reading.decode(item, size, self.masked)
            self._condition(i)
        for item in self.items[LOOKED_THROUGH:]:
            reading.has_mask(item)

    def content(self, i: int) -> str:
        """Returns a digest of the bytes of picture i."""
        return self._content(i)

    def fingerprint(self) -> list[Any]:
        """Returns what decides the pictures, for a cache's name."""
        return ["folder", len(self), reading.digest(self.items)]


def _conditions(items, data, folder):
    """Returns the files of the items' conditions.  Raises ValueError where a picture has none."""
    endings, root = data.maker.endings, Path(data.path) if Path(data.path).is_dir() else Path(data.path).parent
    endings = (*endings, *dict.fromkeys(Path(ending).suffix for ending in endings)) if folder else endings
    place = Path(folder) if folder else root
    if folder and not place.is_dir():
        raise SettingError("condition_folder", folder, "a folder", "no such folder")
    files = sorted(path for path in place.rglob("*") if path.is_file())
    beside = captions.beside(files, endings)
    named = [(place / item.path.relative_to(root).parent, item.path.stem) for item in items]
    bare = [item.path for item, name in zip(items, named, strict=True) if name not in beside]
    if bare:
        said = f"{bare[0].stem}{endings[0]} in {place}" if folder else bare[0].with_suffix(endings[0]).name
        raise ValueError(
            f"{bare[0]} ({len(bare)} of {len(items)} pictures): no file for data.condition={data.condition!r};"
            f" expected {said}"
        )
    return [beside[name] for name in named]


def _counted(count, what):
    return f"{count or 'no'} {what}{'s' * (count != 1)}"
