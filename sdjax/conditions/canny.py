"""OpenCV's Canny edges, equal to the last pixel, without OpenCV; published ControlNets were trained on them.

Source: Canny 1986, "A Computational Approach to Edge Detection"; OpenCV's modules/imgproc/src/canny.cpp for the
details: Sobel of size 3 with a repeated border, |dx| + |dy|, the channel with the steepest slope, directions by tan
22.5 degrees in 15 bits, strict thresholds.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8

from sdjax import settings
from sdjax.conditions.condition import Condition

BITS = 15
TAN = int(0.4142135623730950488 * (1 << BITS) + 0.5)  # tan 22.5 degrees
CONNECTED = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Canny(Condition):
    """White edges on black.

    low, high: thresholds of |dx| + |dy|, 0 to 2040.  An edge has a pixel above `high` and continues over pixels above
    `low`; the ControlNet repository uses 100 and 200.
    """

    low: int = 100
    high: int = 200
    name = "canny"
    kind = "edges"

    def __post_init__(self):
        settings.check(self, low=settings.FROM_0, high=settings.FROM_0)

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the edges of a picture, 255 on a background of 0."""
        found = edges(picture, self.low, self.high)
        return np.repeat(np.where(found, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def edges(picture: UInt8[np.ndarray, "H W *channels"], low: int, high: int) -> Bool[np.ndarray, "H W"]:
    """Returns where cv2.Canny(picture, low, high) is 255, bool [H W]."""
    from scipy import ndimage

    low, high = sorted((low, high))
    dx, dy = slopes(picture)
    steep = np.abs(dx) + np.abs(dy)
    if steep.ndim == 3:
        best = steep.argmax(-1)[..., None]  # the first of equal ones
        dx, dy, steep = (np.take_along_axis(x, best, -1)[..., 0] for x in (dx, dy, steep))
    thin = (steep > low) & _is_ridge(dx, dy, steep)
    regions = np.zeros(thin.shape, np.int32)
    count = ndimage.label(thin, CONNECTED, output=regions)
    strong = np.zeros(int(count) + 1, bool)  # pyright: ignore[reportArgumentType]  # the number alone, with an output
    strong[regions[thin & (steep > high)]] = True
    strong[0] = False
    return strong[regions]


def slopes(
    picture: UInt8[np.ndarray, "H W *channels"],
) -> tuple[Int[np.ndarray, "H W *channels"], Int[np.ndarray, "H W *channels"]]:
    """Returns Sobel's (dx, dy) of a picture, int64, with a repeated border."""
    x = np.pad(picture.astype(np.int64), [(1, 1), (1, 1)] + [(0, 0)] * (picture.ndim - 2), "edge")
    rows, columns = x[:-2] + 2 * x[1:-1] + x[2:], x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    return rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]


def _is_ridge(dx, dy, steep):
    """Returns where the slope is the steepest among its two neighbours in its direction, outside of the picture 0."""
    around = np.pad(steep, 1)
    height, width = steep.shape

    def at(y, x):
        return around[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    x, y = np.abs(dx), np.abs(dy) << BITS
    flat, upright = y < TAN * x, y > TAN * x + (x << (BITS + 1))
    same = (dx ^ dy) >= 0  # equal signs: the slope goes from top left to bottom right
    along = (steep > at(0, -1)) & (steep >= at(0, 1))
    across = (steep > at(-1, 0)) & (steep >= at(1, 0))
    falling = (steep > at(-1, -1)) & (steep > at(1, 1))
    rising = (steep > at(-1, 1)) & (steep > at(1, -1))
    return np.where(flat, along, np.where(upright, across, np.where(same, falling, rising)))
