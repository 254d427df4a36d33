"""An embedding in the pixels of a picture, for pictures whose text was stripped, as A1111 writes it.

    state = read(picture)                    # {"string_to_param": {"*": rows}, "name": ..., ...} or None

A block of columns stands on each side of the picture, apart from it by a column of black.  Of every byte of the blocks
the low four bits count, after an exclusive or with a sequence of numbers; the left block has the low and the right one
the high half of each byte of a zlib stream, whose content is JSON.
Source: AUTOMATIC1111's stable-diffusion-webui 1.10, modules/textual_inversion/image_embedding.py.
"""

import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

MULTIPLIER, STEP, RANGE = 1664525, 1013904223, 255  # of the sequence: x <- a x + c mod 2^32, and the number x mod 255
MOST = 1 << 25  # bytes of JSON; 75 rows of 1,024 numbers have 2 million
LARGEST = 1 << 25  # pixels of a picture that is searched
HALF = 0x0F


def read(picture: Image.Image, hook: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns the value in a picture's pixels, or None without one.  hook: object_hook of the JSON.

    Raises ValueError for a zlib stream that is damaged, too long, or not JSON.
    """
    if picture.width * picture.height > LARGEST:
        return None
    blocks = _blocks(np.asarray(picture.convert("RGB")))
    if blocks is None:
        return None
    low, high = (_plain(block) for block in blocks)
    data = ((high << 4) | low).tobytes()
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, MOST)
    except zlib.error:
        return None  # a picture with black columns
    if not stream.eof:
        raise ValueError(f"its pixels hold a stream without an end, or of more than {MOST} bytes")
    return json.loads(text, object_hook=hook)


def _blocks(pixels: UInt8[np.ndarray, "H W 3"]) -> tuple[UInt8[np.ndarray, "..."], UInt8[np.ndarray, "..."]] | None:
    """Returns the low bits of the blocks left of the first black column and right of the last one; None without."""
    seen = (pixels > 0).any(2)
    rows, columns = np.flatnonzero(np.any(seen, axis=1)), np.flatnonzero(np.any(seen, axis=0))
    if not len(rows):
        return None
    inside = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & HALF  # within a black frame
    black = np.flatnonzero(~np.any(inside, axis=(0, 2)))
    if len(black) < 2:
        return None
    left, right = inside[:, : black[0]], inside[:, black[-1] + 1 :]
    return (left, right) if left.shape == right.shape and left.size else None


def _plain(block: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, " N"]:
    """Returns the numbers of a block without the sequence."""
    return block.reshape(-1) ^ (sequence(block.size) & HALF)


def sequence(count: int) -> UInt8[np.ndarray, " N"]:
    """Returns the first numbers of the sequence, which starts from 0; computes 2^n from the first n at once."""
    states, factor, term = np.array([STEP], np.uint64), MULTIPLIER, STEP
    while len(states) < count:  # x[i + n] = factor x[i] + term
        states = np.concatenate([states, (states * np.uint64(factor) + np.uint64(term)) & np.uint64(0xFFFFFFFF)])
        factor, term = factor * factor % 2**32, (factor + 1) * term % 2**32
    return (states[:count] % RANGE).astype(np.uint8)
