"""Crops pictures with their masks and conditions by a run's Data settings; used by folders and tables.

pictures = Pictures(data, len(items), items.__getitem__)
pictures.example(0, 512, np.random.default_rng(7))        # {"picture" uint8 [512 512 3][, "mask"][, "condition"]}
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data.sources.source import Size
from sdjax.images import reading
from sdjax.images.reading import Held, Readable

KEPT = 16  # a data set of at most this many pictures stays decoded in memory


class Pictures:
    """The pictures of `count` items, by number.

    item(i): picture i and its mask.  condition(i): the file of its condition; None if the run reads no conditions.
    """

    def __init__(
        self,
        data: Any,
        count: int,
        item: Callable[[int], Readable],
        condition: Callable[[int], Path | Held] | None = None,
    ) -> None:
        self.item, self.file = item, condition
        self.crop, self.flip, self.masked, self.maker = data.crop, data.flip, data.mask, data.maker
        kept = count if count <= KEPT else 0
        self._decoded = functools.lru_cache(kept)(self._decode)
        self.middle = functools.lru_cache(kept)(self._cut)  # scales one photo once, not for every row

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i, upright."""
        return reading.shape(self.item(i).path)

    def view(self, i: int, size: Size, mirrored: bool = False) -> dict[str, Any]:
        """Returns the central crop of picture i as `example` does, mirrored or not."""
        return self._cut(i, size, flip=True) if mirrored else self.middle(i, size)

    def example(self, i: int, size: Size, random: np.random.Generator) -> dict[str, Any]:
        """Returns {"picture" uint8 [h w 3]} of picture i, cropped and mirrored by the settings.

        With data.mask also "mask" float32 [h w] in [0, 1]; for conditions from files also "condition" uint8 [h w 3].
        """
        x, y, mirror = random.random(3)
        if self.crop == "center":
            return self.view(i, size, mirror < self.flip)
        return self._cut(i, size, (x, y), mirror < self.flip)

    def check(self, i: int, size: int) -> None:
        """Decodes picture i with its mask and condition.  Raises ValueError naming an unusable file."""
        item = self.item(i)
        reading.decode(item, size, self.masked)
        self._condition(i, item)

    def _decode(self, i, size):
        item = self.item(i)
        picture, mask = reading.decode(item, int(np.max(size)), self.masked)
        return picture, mask, self._condition(i, item)

    def _condition(self, i, item):
        """Returns the condition of picture i from its file, an Image; None if the run reads no such files."""
        if self.file is None:
            return None
        full, file = reading.shape(item.path), self.file(i)
        found = self.maker.read(file, full)
        if abs(found.shape[0] * full[1] - found.shape[1] * full[0]) > max(full):  # more than a pixel of rounding
            sides = [f"{width} x {height}" for height, width in (found.shape[:2], full)]
            raise ValueError(f"{file}: {sides[0]} pixels; expected the proportions of the picture's {sides[1]}")
        return Image.fromarray(found)

    def _cut(self, i, size, place=(0.5, 0.5), flip=False):
        """Returns {"picture"[, "mask"][, "condition"]} of picture i, cropped to `size`."""
        picture, mask, condition = self._decoded(i, size)
        cut = functools.partial(reading.cut, size=size, place=place, flip=flip)
        found = {"picture": cut(picture)}
        if mask is not None:
            found["mask"] = cut(mask).astype(np.float32) / 255
        return found if condition is None else {**found, "condition": cut(condition)}
