"""Styles: a canvas gives flat shapes colours, outlines and shading, and its small picture a finish.

Needs only numpy and Pillow.  Coordinates are pixels of a 64-pixel picture for every size of canvas.  Shapes are drawn
`FINE` times larger and averaged, so edges are smooth.

    canvas = Canvas("comic", size=128)
    canvas.shape(ellipse(32, 32, 10, 12), (250, 220, 200))
    pixels = canvas.finish(place)                                    # uint8 [128 128 3]
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8
from PIL import Image, ImageDraw, ImageFilter

from sdjax.data.pocketland.world import Scene

SIZE = 64  # pixels of the coordinates
FINE = 4  # drawn pixels per picture pixel
Color = Sequence[float]  # RGB, 0 to 255
Points = Float64[np.ndarray, "N 2"] | Sequence[Sequence[float]]


def mix(first: Color, second: Color, share: float) -> tuple[float, float, float]:
    """Returns the colour `share` of the way from first to second."""
    (a, b, c), (x, y, z) = first, second
    return a + (x - a) * share, b + (y - b) * share, c + (z - c) * share


def luma(color: Color) -> float:
    """Returns a colour's brightness, 0 to 255 (ITU-R BT.601 weights)."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _glowing(color: Color) -> Color:
    """Returns the colour of a neon tube: the same hue, bright; black becomes a dim violet grey."""
    top = max(max(color), 1)
    bright = 255 * (0.42 + 0.58 * top / 255)
    mean = sum(color) / 3
    vivid = [max(0.0, mean + (channel - mean) * 1.5) for channel in color]
    top = max(max(vivid), 1)
    return tuple(min(255.0, 14 + channel / top * bright) for channel in vivid)


@dataclass(frozen=True)
class Style:
    """fill, edge: colour to colour; edge width in pixels, 0 for none; shades: whether solids are rounded by shading."""

    fill: Callable[[Color], Color]
    edge: Callable[[Color], Color]
    width: float
    shades: bool = False


STYLES = {
    "photo": Style(lambda c: c, lambda c: mix(c, (0, 0, 0), 0.4), 0.0, shades=True),
    "pencil": Style(lambda c: mix((252, 250, 244), c, 0.5), lambda c: mix(c, (58, 56, 60), 0.8), 0.8),
    "watercolor": Style(lambda c: mix(c, (255, 252, 246), 0.3), lambda c: mix(c, (60, 40, 70), 0.25), 0.6, shades=True),
    "mosaic": Style(lambda c: c, lambda c: mix(c, (0, 0, 0), 0.5), 0.0),
    "neon": Style(lambda c: tuple(6 + 0.34 * channel for channel in c), _glowing, 0.9),
    "comic": Style(lambda c: tuple(_vivid(c)), lambda c: (18, 16, 26), 1.25),
}


def _vivid(color: Color) -> Iterator[float]:
    mean = sum(color) / 3
    return (min(255.0, max(0.0, mean + (channel - mean) * 1.3)) for channel in color)


@lru_cache(256)
def _circle(corners: int) -> Float64[np.ndarray, "corners 2"]:
    angle = np.arange(corners) * (2 * math.pi / corners)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def ellipse(x: float, y: float, width: float, height: float, corners: int = 24) -> Float64[np.ndarray, "corners 2"]:
    """Returns the outline of an ellipse around (x, y) with half axes width and height, [corners 2]."""
    return _circle(corners) * (width, height) + (x, y)


class Canvas:
    """A picture of `size` pixels being drawn.

    unit: picture pixels per unit of the coordinates, 1 at 64 pixels.
    """

    def __init__(self, style: str, size: int = SIZE):
        self.style, self.name, self.size = STYLES[style], style, size
        self.unit = size / SIZE
        self.image = Image.new("RGB", (size * FINE, size * FINE))
        self.pen = ImageDraw.Draw(self.image)
        self.dim = 1.0  # 0.6 for distant things in the neon style
        self.pose(None)

    def pose(
        self, matrix: Float64[np.ndarray, "2 2"] | None, shift: Sequence[float] | Float64[np.ndarray, " 2"] = (0.0, 0.0)
    ) -> None:
        """Sets the transform of all later shapes: points @ matrix + shift; matrix None resets it."""
        self.matrix, self.shift = matrix, shift

    def _points(self, points: Points) -> list[float]:
        points = np.asarray(points, np.float64)
        if self.matrix is not None:
            points = points @ self.matrix + self.shift
        return (points * (FINE * self.unit)).ravel().tolist()

    def _width(self, width: float) -> int:
        return max(1, round(width * FINE * self.unit))

    def _ink(self, color: Color, change: Callable[[Color], Color]) -> tuple[int, int, int]:
        red, green, blue = change(color)
        return int(red * self.dim), int(green * self.dim), int(blue * self.dim)

    def shape(self, points: Points, color: Color, edge: bool = True, bright: bool = False) -> None:
        """Fills a polygon; edge: outline it in styles with outlines; bright: keep its colour in dark styles."""
        flat = self._points(points)
        fill = _glowing if bright and self.name == "neon" else self.style.fill
        self.pen.polygon(flat, self._ink(color, fill))
        if edge and self.style.width:
            width = self._width(self.style.width * (0.75 if self.dim < 1 else 1.0))
            self.pen.line(flat + flat[:4], self._ink(color, self.style.edge), width)

    def solid(self, points: Points, color: Color, depth: float = 1.0) -> None:
        """Fills a polygon and, in styles with shading, rounds it: lighter inside."""
        if not self.style.shades:
            return self.shape(points, color)
        points = np.asarray(points, np.float64)
        middle = (points.min(0) + points.max(0)) / 2
        self.shape(points, mix(color, (20, 0, 20), 0.20 * depth))
        self.shape((points - middle) * 0.93 + middle + (-0.3, -0.3), mix(color, (20, 0, 20), 0.08 * depth), edge=False)
        self.shape((points - middle) * 0.82 + middle + (-0.7, -0.6), color, edge=False)

    def line(self, points: Points, color: Color, width: float, bright: bool = False) -> None:
        """Draws a line of a width in pixels; in the neon style it is a tube."""
        ink = _glowing if self.name == "neon" and bright else self.style.fill
        if self.name == "pencil":
            ink = self.style.edge
        self.pen.line(self._points(points), self._ink(color, ink), self._width(width), "curve")

    def bands(self, top: Color, bottom: Color, first: float, last: float, count: int = 10) -> None:
        """Fills the rows from `first` to `last` with `count` bands from one colour to the other."""
        for index in range(count):
            y = [round(FINE * self.unit * (first + (last - first) * (index + i) / count)) for i in (0, 1)]
            self.pen.rectangle(
                (0, y[0], self.size * FINE, y[1]), self._ink(mix(top, bottom, index / (count - 1)), self.style.fill)
            )

    def end_background(self) -> None:
        """Blurs the background in the photo style, as a lens does; later shapes are near."""
        if self.name == "photo":
            small = self.image.reduce(FINE).filter(ImageFilter.BoxBlur(0.7 * self.unit))
            self.image.paste(small.resize(self.image.size, Image.Resampling.BILINEAR))
        self.dim = 1.0

    def finish(self, place: Scene) -> UInt8[np.ndarray, "S S 3"]:
        """Returns the picture as uint8 [size size 3] with the style's finish and the scene's light."""
        image, size = self.image.reduce(FINE), self.size
        if self.name == "mosaic":
            return _lit(_mosaic(image, self.unit), place)
        if self.name == "watercolor":
            soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2 * self.unit)), np.float32)
            picture = 0.55 * np.asarray(image, np.float32) + 0.45 * soft
            picture = picture * _stains(size) + (1 - _paper(size)) * (
                np.array([253, 250, 244], np.float32) - picture * _stains(size)
            )
            return _lit(picture, place, 0.5)
        picture = np.asarray(image, np.float32)
        if self.name == "neon":
            glow = np.asarray(image.filter(ImageFilter.GaussianBlur(2.5 * self.unit)), np.float32)
            return _lit(picture + 0.55 * glow, place, 0.5)
        if self.name == "pencil":
            paper = np.array([252, 250, 244], np.float32)
            return _lit(paper + (picture * _hatch(size) - paper) * _paper(size, soft=True), place, 0.3)
        if self.name == "photo":
            side = np.linspace(-1, 1, size, dtype=np.float32)
            lean = 0.10 * (1 if place.gaze > 0 else -1)
            return _lit(picture * (1.03 - lean * side[None, :, None] - 0.05 * side[:, None, None]), place)
        return _lit(picture, place)


def _lit(picture: Float[np.ndarray, "S S 3"], place: Scene, strength: float = 1.0) -> UInt8[np.ndarray, "S S 3"]:
    warm = 0.06 * place.warmth
    gain = (1 + 0.09 * strength * place.brightness) * (1 + strength * np.array([warm, 0, -warm], np.float32))
    return np.clip(picture * gain + 0.5, 0, 255).astype(np.uint8)


def _mosaic(image: Image.Image, unit: float) -> Float[np.ndarray, "S S 3"]:
    """Returns the picture as tiles of two units; every second tile ends with a joint of mortar one unit wide."""
    tiles = image.reduce(round(2 * unit)).resize(image.size, Image.Resampling.NEAREST)
    joint = np.array([48, 46, 52], np.float32)
    mixed = 0.6 * np.asarray(tiles, np.float32) + 0.4 * np.asarray(image, np.float32)
    return joint + (mixed - joint) * _mortar(image.width)


@lru_cache(4)
def _mortar(size: int) -> Float32[np.ndarray, "S S 1"]:
    y, x = np.mgrid[:size, :size] * SIZE // size % 4
    return np.where((x == 3) | (y == 3), 0.72, 1.0).astype(np.float32)[..., None]


@lru_cache(4)
def _hatch(size: int) -> Float32[np.ndarray, "S S 1"]:
    y, x = np.mgrid[:size, :size]
    return (1 - 0.045 * (1 + np.cos((x + y) * (2 * math.pi / (4 * size / SIZE))))).astype(np.float32)[..., None]


@lru_cache(4)
def _stains(size: int) -> Float32[np.ndarray, "S S 1"]:
    y, x = np.mgrid[:size, :size] / size
    wave = np.sin(9 * x + 4 * np.sin(7 * y)) * np.sin(8 * y + 3 * np.sin(6 * x + 1))
    return (1 + 0.045 * wave).astype(np.float32)[..., None]


@lru_cache(8)
def _paper(size: int, soft: bool = False) -> Float32[np.ndarray, "S S 1"]:
    """Returns a mask: 1 where paint covers the paper, 0 at the paper's free edge."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    wave = 0 if soft else 0.008 * (np.sin(15 * x + 1) + np.sin(17 * y + 2) + np.sin(31 * (x - y)))
    distance = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) + wave
    ramp = (distance + 0.01) / 0.10 if soft else (distance - 0.02) / 0.035
    return np.clip(ramp, 0, 1).astype(np.float32)[..., None]
