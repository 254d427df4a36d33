"""An image folder, or one image, as a source: picture i with its prompt, augmented by a generator of its own.

source = Folder(Data(path="photos/cat", word="<cat>", templates="object", crop="random", flip=0.5), size=512)
source.example(0, np.random.default_rng(7))         # {"picture" uint8 [512 512 3], "caption"[, "mask" [512 512]]}
"""

import collections
import functools

import numpy as np

from sdjax import settings
from sdjax.data import prompts
from sdjax.images import reading

CROPS = ("center", "random")
KEPT = 16  # decoded pictures kept: a folder for personalisation is read once


def check(data):
    """Raises ValueError for a crop or a flip that no picture can have."""
    settings.check(data, "data.", crop=CROPS, flip=settings.TO_1)


class Folder:
    """The pictures that a run's Data settings name, at `size` pixels.

    Raises ValueError for settings out of range, a folder without pictures, pictures without a caption where prompts
    need one, and data.mask where no picture brings a mask.
    """

    def __init__(self, data, size):
        check(data)
        self.items, self.passed_over = reading.find(data.path), reading.passed_over(data.path)
        self.size, self.crop, self.flip, self.masked = size, data.crop, data.flip, data.mask
        self.prompts = prompts.make(data.templates, data.word)
        bare = [] if data.word else [item.path for item in self.items if not item.caption]
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
        self._decoded = functools.lru_cache(KEPT if len(self.items) <= KEPT else 0)(self._decode)

    def __len__(self):
        return len(self.items)

    def epoch(self) -> list[int]:
        """Returns the numbers of an epoch's pictures, each as often as its folder's name says ("10_sks dog")."""
        return [i for i, item in enumerate(self.items) for _ in range(item.times)]

    def about(self) -> str:
        """Returns what there is, in words: "34 pictures, 70 an epoch; passed over: 2 .heic"."""
        shown = len(self.epoch())
        often = f", {shown} an epoch" if shown != len(self) else ""
        left = f"; passed over: {reading.counted(self.passed_over)}" if self.passed_over else ""
        return f"{len(self)} {'picture' if len(self) == 1 else 'pictures'}{often}{left}"

    def _decode(self, i):
        return reading.decode(self.items[i], self.size, self.masked)

    def picture(self, i):
        """Returns the middle of picture i, uint8 [size size 3]."""
        return reading.square(self._decoded(i)[0], self.size)

    def caption(self, i, random):
        """Returns a prompt for picture i."""
        return self.prompts(self.items[i].caption, random)

    def other(self, i, random):
        """Returns the number of another picture in the same sub-folder; i itself where there is none."""
        subject = self.items[i].subject
        same = self.subjects[subject] if subject else [i]
        step = random.integers(1, len(same)) if len(same) > 1 else 0
        return same[(same.index(i) + step) % len(same)]

    def example(self, i, random):
        """Returns {"picture", "caption"} of picture i, with data.mask also "mask", float32 [size size] in [0, 1]."""
        x, y, mirror = random.random(3)
        cut = functools.partial(
            reading.square,
            size=self.size,
            place=(x, y) if self.crop == "random" else (0.5, 0.5),
            flip=mirror < self.flip,
        )
        picture, mask = self._decoded(i)
        example = {"picture": cut(picture), "caption": self.caption(i, random)}
        return {**example, "mask": cut(mask).astype(np.float32) / 255} if self.masked else example

    def fingerprint(self):
        """Returns what decides the pictures, for a cache's name."""
        return ["folder", len(self), reading.digest(self.items)]
