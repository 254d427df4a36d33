"""An image folder, or one image, as a source; each example has its own random generator for augmentation.

examples = ImageFolder().open(Data(path="photos/cat", word="<cat>", templates="object", crop="random", flip=0.5))
examples.example(0, 512, np.random.default_rng(7))  # {"picture" uint8 [512 512 3], "caption"[, "mask" [512 512]]}

The file of a condition (data.condition=files, openpose, ...) is next to its picture, or in data.condition_folder under
the picture's name.  It is cropped and mirrored with the picture.
"""

import collections
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sdjax.data import prompts
from sdjax.data.sources.pictures import Pictures
from sdjax.data.sources.source import Examples, Size, Source
from sdjax.images import captions, reading
from sdjax.settings import SettingError

LOOKED_THROUGH = 64  # pictures decoded by the check before a model is loaded; only headers of the others are read


@dataclass(frozen=True)
class ImageFolder(Source):
    """A folder of images with its sub-folders, or one image.

    condition_folder: folder of the conditions' files, named NAME.png or as next to pictures; "" for the pictures' own.
    """

    last: ClassVar[bool] = True
    condition_folder: str = ""

    def matches(self, path: str) -> bool:
        """Returns whether a path is a folder, a file with an image's ending, or a file with an image's header."""
        place = Path(path)
        if place.is_dir() or (place.is_file() and place.suffix.lower() in reading.SUFFIXES):
            return True
        try:
            return place.is_file() and reading.has_mask(reading.Item(place)) in (True, False)
        except ValueError:
            return False

    def open(self, data: Any) -> Examples:
        """Returns the examples of the folder.  Raises the same errors as Folder."""
        return Folder(data, self.condition_folder)


class Folder(Examples):
    """The pictures of a run's Data settings.

    Raises ValueError for a folder without pictures, a picture without the caption that its templates need, data.mask
    without any mask, and a picture without its condition's file.
    """

    def __init__(self, data: Any, condition_folder: str = "") -> None:
        self.settings = data, condition_folder
        self.items, self.passed_over = reading.find(data.path), reading.passed_over(data.path)
        self.masked = data.mask
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
        filed = data.maker is not None and data.maker.endings
        conditions = _conditions(self.items, data, condition_folder).__getitem__ if filed else None
        self.subjects = collections.defaultdict(list)
        for i, item in enumerate(self.items):
            self.subjects[item.subject].append(i)
        self._content = functools.cache(lambda i: reading.digest([self.items[i]]))
        self.pictures = Pictures(data, len(self.items), self.items.__getitem__, conditions)

    def __reduce__(self) -> tuple:
        return Folder, self.settings

    def __len__(self) -> int:
        return len(self.items)

    def epoch(self) -> list[int]:
        """Returns the numbers of an epoch's pictures; a folder "10_sks dog" repeats its pictures 10 times."""
        return [i for i, item in enumerate(self.items) for _ in range(item.times)]

    def about(self) -> str:
        """Returns a summary: "34 pictures, 70 an epoch, 30 captions; passed over: 2 .heic"."""
        shown, texts = len(self.epoch()), sum(bool(item.caption) for item in self.items)
        words = [_counted(len(self), "picture"), *([f"{shown} an epoch"] if shown != len(self) else [])]
        words.append(_counted(texts, "caption"))
        if self.masked:
            words.append(_counted(sum(map(reading.has_mask, self.items)), "mask"))
        left = f"; passed over: {reading.counted(self.passed_over)}" if self.passed_over else ""
        return ", ".join(words) + left

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i, upright."""
        return self.pictures.shape(i)

    def picture(self, i: int, size: Size) -> np.ndarray:
        """Returns the central crop of picture i, uint8 [h w 3]."""
        return self.view(i, size)["picture"]

    def view(self, i: int, size: Size, mirrored: bool = False) -> dict[str, Any]:
        """Returns the central crop of picture i with the mask and condition that the run reads, mirrored or not."""
        return self.pictures.view(i, size, mirrored)

    def caption(self, i: int, random: np.random.Generator) -> str:
        """Returns a prompt for picture i, with the word of its sub-folder if data.words has one."""
        item = self.items[i]
        word = self.words.get(item.subject, self.prompts.word)
        return replace(self.prompts, word=word)(item.caption, random)

    def other(self, i: int, random: np.random.Generator) -> int:
        """Returns the number of another picture in the same sub-folder; i itself without one."""
        subject = self.items[i].subject
        same = self.subjects[subject] if subject else [i]
        step = random.integers(1, len(same)) if len(same) > 1 else 0
        return same[(same.index(i) + step) % len(same)]

    def example(self, i: int, size: Size, random: np.random.Generator) -> dict[str, Any]:
        """Returns {"picture", "caption"} of picture i; with data.mask also "mask", float32 [h w] in [0, 1].

        A condition from a file adds "condition", uint8 [h w 3].
        """
        return {**self.pictures.example(i, size, random), "caption": self.caption(i, random)}

    def check(self, size: int) -> None:
        """Decodes the first LOOKED_THROUGH pictures and reads the headers of the others.

        Raises ValueError naming an unusable file.
        """
        for i in range(min(len(self), LOOKED_THROUGH)):
            self.pictures.check(i, size)
        for item in self.items[LOOKED_THROUGH:]:
            reading.has_mask(item)

    def content(self, i: int) -> str:
        """Returns a digest of the bytes of picture i."""
        return self._content(i)

    def fingerprint(self) -> list[Any]:
        """Returns plain values that identify the pictures, for a cache's name."""
        return ["folder", len(self), reading.digest(self.items)]


def _conditions(items, data, folder):
    """Returns the files of the items' conditions.  Raises ValueError for a picture without one."""
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
