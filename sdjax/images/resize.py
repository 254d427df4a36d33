"""Resizes pictures to a model's size.

    fit(picture, (512, 768), "crop")          # uint8 [512 768 3]
    pad(pictures, 8)                          # sides up to multiples of 8, the edge repeated

Shapes: H W pixels.  A size is (height, width).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

MODES = ("crop", "fill", "stretch")
Size = Sequence[int]  # height, width


def fit(
    picture: UInt8[np.ndarray, "H W *channels"], size: Size, mode: str = "crop"
) -> UInt8[np.ndarray, "h w *channels"]:
    """Returns a picture uint8 [H W 3], or a mask [H W], resized to `size`; unchanged if it has that size.

    mode: "crop" scales to cover the size and cuts both sides evenly; "fill" scales to fit inside and repeats the edges;
    "stretch" scales each side by its own factor.
    Source: the resize modes of A1111's image-to-image.
    Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"resize={mode!r}: expected one of {', '.join(MODES)}")
    if picture.shape[:2] == tuple(size):
        return picture
    if mode == "stretch":
        return _scaled(picture, size)
    ratios = [wanted / given for wanted, given in zip(size, picture.shape, strict=False)]
    ratio = max(ratios) if mode == "crop" else min(ratios)
    inner = [max(1, round(given * ratio)) for given in picture.shape[:2]]
    scaled = _scaled(picture, inner)
    if mode == "crop":
        top, left = ((has - wanted) // 2 for has, wanted in zip(inner, size, strict=True))
        return np.ascontiguousarray(scaled[top : top + size[0], left : left + size[1]])
    rest = [wanted - has for has, wanted in zip(inner, size, strict=True)]
    return np.pad(scaled, [(n // 2, n - n // 2) for n in rest] + [(0, 0)] * (picture.ndim - 2), "edge")


def _scaled(picture: UInt8[np.ndarray, "H W *channels"], size: Size) -> UInt8[np.ndarray, "h w *channels"]:
    smooth = Image.Resampling.LANCZOS if picture.ndim == 3 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), smooth))


def nearest(pictures: UInt8[np.ndarray, "B H W 3"], size: Size) -> UInt8[np.ndarray, "B h w 3"]:
    """Returns pictures [B H W 3] resized to `size` by repeating pixels."""
    small = Image.Resampling.NEAREST
    return np.stack([np.asarray(Image.fromarray(one).resize((size[1], size[0]), small)) for one in pictures])


def pad(pictures: Shaped[np.ndarray, "B H W *channels"], multiple: int) -> Shaped[np.ndarray, "B h w *channels"]:
    """Returns pictures [B H W ...] padded to multiples of a number, by repeating the lower and right edges."""
    sides = [(0, -side % multiple) for side in pictures.shape[1:3]]
    return np.pad(pictures, [(0, 0), *sides] + [(0, 0)] * (pictures.ndim - 3), "edge")


def fitted(
    pictures: Any, count: int, size: int | Size | None = None, mode: str = "crop", channels: int | None = 3
) -> UInt8[np.ndarray, "B h w *channels"]:
    """Returns `count` pictures of one size, uint8 [B H W 3]; with channels=None, masks [B H W].

    pictures: an array or PIL image, or a list of them; a single one is repeated.  size: None takes the first picture's.
    Raises ValueError for another number of pictures, and for a picture that is not uint8.
    """
    shape = "[H W 3]" if channels else "[H W]"
    many = isinstance(pictures, (list, tuple)) or np.ndim(pictures) == (4 if channels else 3)
    arrays = [np.asarray(picture) for picture in (pictures if many else [pictures])]
    for array in arrays:
        if array.dtype != np.uint8 or array.shape[2:] != ((channels,) if channels else ()) or array.ndim < 2:
            raise ValueError(f"a picture of type {array.dtype} {list(array.shape)}: expected uint8 {shape}")
    if len(arrays) not in (1, count):
        raise ValueError(f"{len(arrays)} pictures for {count} prompts: expected one, or as many")
    size = arrays[0].shape[:2] if size is None else (size, size) if isinstance(size, int) else tuple(size)
    fitted = [fit(array, size, mode) for array in arrays]
    return np.stack(fitted * (count // len(fitted)))
