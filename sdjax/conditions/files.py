"""Conditions from files: any picture, segmentations and masks.

NAME.condition.png next to NAME.png is any picture for a ControlNet.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdjax.conditions.condition import Condition
from sdjax.images import reading
from sdjax.images.reading import Held

PICTURES = tuple(f".condition{ending}" for ending in (".png", ".jpg", ".jpeg", ".webp"))


@dataclass(frozen=True)
class Files(Condition):
    """A picture, unchanged."""

    name = "files"
    kind = "a picture from a file, as it is"
    endings = PICTURES

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the picture."""
        return picture


@dataclass(frozen=True)
class Mask(Condition):
    """A mask in white, see images.masks."""

    name = "mask"
    kind = "a mask from a file"
    endings = (*PICTURES, ".mask.png", "-masklabel.png")

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns 255 where the brightest channel is at least 128, else 0."""
        return np.repeat(np.where(picture.max(-1) >= 128, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)

    def read(self, file: str | Path | Held, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the mask in a file, 255 on 0."""
        return self.make(np.repeat(reading.mask(file)[..., None], 3, axis=-1))


@dataclass(frozen=True)
class Segmentation(Condition):
    """Coloured regions: a file's own colours, or PASCAL VOC's for a grey file of class numbers."""

    name = "segmentation"
    kind = "regions from a file"
    endings = (*PICTURES, ".segmentation.png")

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns a colour picture unchanged, and a grey one with a colour for each class number."""
        grey = (picture == picture[..., :1]).all()
        return colours()[picture[..., 0]] if grey else picture


def colours() -> UInt8[np.ndarray, "256 3"]:
    """Returns the colours of 256 classes.

    Source: PASCAL VOC's development kit, VOClabelcolormap: the bits of a number, from the lowest on, become in turn the
    highest bits of red, green and blue.
    """
    numbers = np.arange(256)
    table = np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = (numbers >> (3 * place + channel)) & 1
            table[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return table


def saved(condition: UInt8[np.ndarray, "H W 3"], picture: str | Path) -> Path:
    """Writes a condition next to its picture's file, where `Files` reads it; returns the path."""
    path = Path(picture).with_suffix(PICTURES[0])
    Image.fromarray(condition).save(path)
    return path
