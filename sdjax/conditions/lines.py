"""Straight lines, as on a blueprint, for mlsd ControlNets.

OpenCV's line segment detector finds them (the extra `conditions`).  Source: von Gioi et al. 2012, "LSD: a Line Segment
Detector".  The mlsd checkpoints were trained with M-LSD, a network; like it, this module draws lines one pixel wide.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from sdjax import settings
from sdjax.conditions.condition import Condition


@dataclass(frozen=True)
class Lines(Condition):
    """White lines on black.  length: length of the shortest line, as a fraction of the picture's shorter side."""

    length: float = 0.05
    name = "lines"
    kind = "straight lines"

    def __post_init__(self):
        settings.check(self, length=settings.TO_1)

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the straight lines of a picture.  Raises ValueError if OpenCV is not installed."""
        height, width = picture.shape[:2]
        page = Image.new("L", (width, height))
        draw = ImageDraw.Draw(page)
        for x0, y0, x1, y1 in segments(picture):
            if np.hypot(x1 - x0, y1 - y0) >= self.length * min(height, width):
                draw.line((x0, y0, x1, y1), 255, 1)
        return np.repeat(np.asarray(page)[..., None], 3, axis=-1)


def segments(picture: UInt8[np.ndarray, "H W 3"]) -> list[tuple[float, float, float, float]]:
    """Returns the line segments (x0, y0, x1, y1) that OpenCV's detector finds in a picture, in pixels."""
    try:
        import cv2
    except ImportError:
        raise ValueError('condition "lines" needs OpenCV: pip install -e ".[conditions]"') from None
    found = cv2.createLineSegmentDetector().detect(np.asarray(Image.fromarray(picture).convert("L")))[0]
    ends = np.zeros((0, 4)) if found is None else np.asarray(found).reshape(-1, 4)
    return [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in ends]
