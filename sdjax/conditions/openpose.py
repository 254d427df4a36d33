"""Draws skeletons from OpenPose's JSON, in the colours of published ControlNets' training.

    {"people": [{"pose_keypoints_2d": [x, y, score, ...]}], "canvas_width": 512, "canvas_height": 768}

A person has 18 points (COCO) or 25 (BODY_25); x and y are pixels, or fractions of the picture if none exceeds 1.
Source: CMU OpenPose, doc/02_output.md (the files); the ControlNet repository, annotator/openpose/util.py (limbs,
colours, widths; limbs at 0.6 of their colours).
"""

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from sdjax import settings
from sdjax.conditions.condition import Condition
from sdjax.images import reading
from sdjax.images.reading import Held

MAX_BYTES = 1 << 20
# Pairs of COCO's points in drawing order: shoulders, arms, trunk and legs, head.
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
         (0, 14), (14, 16), (0, 15), (15, 17))  # fmt: skip
BODY_25 = (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18)  # COCO's points in BODY_25, in COCO's order
POINTS = 18
DIMMED = 0.6
WIDTH, RADIUS = 4, 4  # half width of a limb, radius of a point; in pixels of a picture of 512


@dataclass(frozen=True)
class OpenPose(Condition):
    """Coloured skeletons on black.  score: points with a lower score are not drawn."""

    score: float = 0.0
    name = "openpose"
    kind = "skeletons from OpenPose's JSON"
    endings = (".condition.json", "_keypoints.json")
    mirrors = False

    def __post_init__(self):
        settings.check(self, score=settings.TO_1)

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Raises ValueError, since a skeleton needs a file."""
        raise ValueError('condition "openpose": drawn from OpenPose\'s JSON, not from a picture; give such a file')

    def read(self, file: str | Path | Held, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the skeletons in a JSON file.

        size: (height, width); None takes canvas_height and canvas_width from the file.
        Raises ValueError naming a file that is too long, is not OpenPose's JSON or has a canvas out of range.
        """
        content = reading.content(file, MAX_BYTES)
        try:
            said = json.loads(content.decode("utf-8"))
            said = said[0] if isinstance(said, list) else said  # sd-webui-controlnet writes a list of one
            people = [_points(person["pose_keypoints_2d"]) for person in said["people"]]
            height, width = size or (int(said["canvas_height"]), int(said["canvas_width"]))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            more = "" if size else ", canvas_width and canvas_height"
            raise ValueError(f"{file}: expected OpenPose's JSON, with people, pose_keypoints_2d{more}") from None
        if not 16 <= min(height, width) <= max(height, width) <= 16384:
            raise ValueError(f"{file}: a canvas of {width} x {height} pixels; expected sides of 16 to 16384")
        return drawn(people, (height, width), self.score)


def _points(numbers: Sequence[float]) -> Float[np.ndarray, "18 3"]:
    """Returns (x, y, score) of COCO's 18 points."""
    points = np.asarray(numbers, np.float32).reshape(-1, 3)
    if not np.isfinite(points).all():
        raise ValueError("points that are not finite")
    points = points[list(BODY_25)] if len(points) >= 25 else points
    if len(points) < POINTS:
        raise ValueError(f"{len(points)} points")
    return points[:POINTS]


def drawn(
    people: Sequence[Float[np.ndarray, "18 3"]], size: tuple[int, int], score: float = 0.0
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns skeletons uint8 [H W 3] from the points (x, y, score) of people; points of score 0 are missing."""
    height, width = size
    page = Image.new("RGB", (width, height))
    draw, scale = ImageDraw.Draw(page), max(min(size) / 512, 1 / 8)
    for points in people:
        shares = points[:, :2].max(initial=0) <= 1
        places = points[:, :2] * ((width, height) if shares else 1)
        there = (points[:, 2] > 0) & (points[:, 2] >= score)
        for i, (one, other) in enumerate(LIMBS):
            if there[one] and there[other]:
                colour = tuple(int(DIMMED * part) for part in _colour(i))
                draw.polygon(_limb(places[one], places[other], WIDTH * scale), colour)
        for i in range(POINTS):
            if there[i]:
                (x, y), r = places[i], RADIUS * scale
                draw.ellipse((x - r, y - r, x + r, y + r), _colour(i))
    return np.asarray(page)


def _colour(i: int) -> tuple[int, int, int]:
    """Returns the colour of limb or point i: full hues, 20 degrees apart, from red on."""
    red, green, blue = colorsys.hsv_to_rgb(i / POINTS, 1, 1)
    return round(255 * red), round(255 * green), round(255 * blue)


def _limb(one, other, half):
    """Returns the corners of an ellipse from one point to another, at most `half` pixels from its axis."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    along = (other - one) / 2
    length = max(float(np.hypot(*along)), 1e-6)
    aside = np.array([-along[1], along[0]]) / length * half
    corners = (one + other) / 2 + np.cos(angle)[:, None] * along + np.sin(angle)[:, None] * aside
    return [tuple(map(float, corner)) for corner in corners]
