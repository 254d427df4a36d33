"""The places of Pocketland: one function per place, which draws on a Canvas from 12 layout numbers in [0, 1].

BACKGROUNDS["beach"](canvas, place.layout)
"""

import colorsys
import math
from collections.abc import Sequence

import numpy as np

from sdjax.data.pocketland.canvas import Canvas, Color, ellipse


def _hue(hue: float, lightness: float = 0.55, saturation: float = 0.8) -> Color:
    return tuple(255 * channel for channel in colorsys.hls_to_rgb(hue, lightness, saturation))


def _ground(
    canvas: Canvas,
    color: Color,
    y: float,
    height: float = 0.0,
    phase: float = 0.0,
    waves: float = 1.0,
    edge: bool = True,
) -> None:
    x = np.linspace(-2, 66, 18)
    top = y - height * np.sin(x / 64 * 2 * math.pi * waves + 2 * math.pi * phase)
    canvas.shape(np.concatenate([np.stack([x, top], 1), [(66, 67), (-2, 67)]]), color, edge)


def _side(u: float, low: float = 3.0, high: float = 13.0) -> float:
    """Returns an x near the left border for u < 0.5, else near the right border."""
    return low + (high - low) * (u * 2 % 1) if u < 0.5 else 64 - low - (high - low) * (u * 2 % 1)


def beach(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws a beach; u: numbers in [0, 1) that vary it."""
    canvas.bands((110, 196, 250), (196, 232, 252), 0, 30)
    canvas.shape(ellipse(10 + 44 * u[0], 8 + 4 * u[1], 5, 5), (255, 226, 90), bright=True)
    horizon = 28 + 6 * u[2]
    canvas.bands((20, 96, 190), (60, 170, 215), horizon, 47, 6)
    _ground(canvas, (238, 212, 148), 45 + 3 * u[3], 1.2, u[4])
    x, y = _side(u[5], 4, 9), 34 + 4 * u[6]
    canvas.line([(x, y), (x, y + 18)], (240, 240, 235), 1.0)
    arc = ellipse(x, y, 9, 8)
    canvas.shape(arc[12:].tolist() + [arc[0].tolist()], (226, 52, 48), bright=True)
    canvas.shape([(x - 3, y), (x, y - 8), (x + 3, y)], (250, 245, 235), edge=False, bright=True)


def snow(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws a snowy field; u: numbers in [0, 1) that vary it."""
    canvas.bands((140, 166, 206), (196, 210, 232), 0, 44)
    _ground(canvas, (226, 234, 246), 40 + 4 * u[0], 2.5, u[1])
    _ground(canvas, (248, 251, 255), 50 + 3 * u[2], 2, u[3])
    x, y = _side(u[4], 5, 9), 50.0
    for dy, radius in ((2, 6.0), (-6, 4.4), (-12, 3.2)):
        canvas.shape(ellipse(x, y + dy, radius, radius, 16), (252, 253, 255))
    canvas.shape([(x - 3.6, y - 14.4), (x - 2.2, y - 18.5), (x + 2.2, y - 18.5), (x + 3.6, y - 14.4)], (44, 40, 56))
    canvas.shape([(x, y - 12.6), (x + 4, y - 11.6), (x, y - 11)], (240, 130, 40), edge=False, bright=True)
    for index in range(9):
        a, b = u[index % 12], u[(index * 5 + 3) % 12]
        canvas.shape(
            ellipse((a * 64 + index * 7.3) % 64, (b * 48 + index * 5.1) % 48, 1.3, 1.3, 10),
            (255, 255, 255),
            False,
            True,
        )


def city(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws a city at night; u: numbers in [0, 1) that vary it."""
    canvas.bands((14, 14, 44), (62, 44, 92), 0, 64)
    canvas.shape(ellipse(10 + 44 * u[0], 8, 4, 4), (250, 244, 200), bright=True)
    for index, x in enumerate((-2, 9, 20, 33, 44, 54)):
        top = 14 + 16 * ((u[index] * 7) % 1) + (14 if 2 <= index <= 3 else 0)
        canvas.shape([(x, 66), (x, top), (x + 11, top), (x + 11, 66)], (34 + 8 * (index % 2), 34, 66))
        for row in range(4):
            for column in (2.2, 6.6):
                if (row * 3 + int(column) + int(u[index] * 9)) % 4:
                    y = top + 3 + row * 6
                    box = [(x + column, y), (x + column + 2.4, y), (x + column + 2.4, y + 3), (x + column, y + 3)]
                    canvas.shape(box, (255, 212, 92), False, True)


def forest(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws a forest; u: numbers in [0, 1) that vary it."""
    canvas.bands((150, 196, 130), (84, 140, 78), 0, 64)
    for index, x in enumerate((4, 18, 32, 46, 60)):
        x, top = x + 6 * (u[index] - 0.5), 2 + 12 * u[index + 5]
        canvas.shape([(x - 1.6, 66), (x - 1.6, 44), (x + 1.6, 44), (x + 1.6, 66)], (98, 64, 38))
        color = (22 + 26 * (index % 2), 92 + 24 * (index % 2), 42)
        canvas.shape([(x - 10, 50), (x, top + 12), (x + 10, 50)], color)
        canvas.shape([(x - 7.5, 32), (x, top), (x + 7.5, 32)], color)


def space(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws space; u: numbers in [0, 1) that vary it."""
    canvas.bands((8, 6, 26), (26, 14, 52), 0, 64)
    for index in range(14):
        a, b = u[index % 12], u[(index * 7 + 2) % 12]
        x, y = (a * 64 + index * 9.7) % 64, (b * 64 + index * 13.1) % 64
        canvas.shape(ellipse(x, y, 0.9, 0.9, 8), (255, 255, 255), False, True)
    x, y, hue = _side(u[0], 7, 12), 9 + 8 * u[1], u[2]
    canvas.shape(ellipse(x, y, 6.5, 6.5), _hue(hue), bright=True)
    canvas.line(ellipse(x, y, 10.5, 2.6)[[11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]], (240, 226, 190), 1.1, True)
    canvas.shape(ellipse(64 - x, 46 + 10 * u[3], 5, 5), (172, 172, 184), bright=True)


def desert(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws a desert; u: numbers in [0, 1) that vary it."""
    canvas.bands((246, 150, 84), (255, 214, 150), 0, 42)
    canvas.shape(ellipse(10 + 44 * u[0], 10 + 4 * u[1], 6, 6), (255, 246, 190), bright=True)
    _ground(canvas, (222, 150, 78), 40 + 4 * u[2], 3.5, u[3], 1.0)
    _ground(canvas, (200, 122, 58), 52 + 2 * u[4], 2.5, u[5], 1.3)
    x, y = _side(u[6], 5, 9), 52
    for points in (
        [(x, y), (x, y - 24)],
        [(x, y - 9), (x - 5, y - 9), (x - 5, y - 17)],
        [(x, y - 6), (x + 5, y - 6), (x + 5, y - 13)],
    ):
        canvas.line(points, (44, 130, 66), 3.0, True)


def meadow(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws a meadow; u: numbers in [0, 1) that vary it."""
    canvas.bands((126, 200, 255), (206, 236, 255), 0, 40)
    x = 8 + 48 * u[0]
    for dx, radius in ((-4.5, 3.2), (0, 4.4), (4.5, 3.2)):
        canvas.shape(ellipse(x + dx, 8 + 2 * u[1], radius + 1, radius, 16), (255, 255, 255), False)
    _ground(canvas, (112, 196, 74), 38 + 4 * u[2], 3, u[3], 0.6)
    _ground(canvas, (84, 172, 58), 50, 2, u[4], 0.8)
    for index in range(10):
        a, b = u[index % 12], u[(index * 5 + 1) % 12]
        x, y = (index * 6.7 + 5 * a) % 64, 43 + 18 * b
        canvas.shape(
            ellipse(x, y, 1.9, 1.9, 10), ((250, 84, 120), (255, 236, 90), (250, 250, 255))[index % 3], False, True
        )


def room(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws a room; u: numbers in [0, 1) that vary it."""
    canvas.bands((226, 204, 168), (214, 186, 146), 0, 50)
    x, y = _side(u[0], 5, 8), 6 + 6 * u[1]
    canvas.shape([(x - 9, y), (x + 9, y), (x + 9, y + 20), (x - 9, y + 20)], (250, 246, 236))
    canvas.shape([(x - 7, y + 2), (x + 7, y + 2), (x + 7, y + 18), (x - 7, y + 18)], (120, 176, 232), False, True)
    canvas.line([(x, y), (x, y + 20)], (250, 246, 236), 1.4)
    canvas.line([(x - 8, y + 10), (x + 8, y + 10)], (250, 246, 236), 1.4)
    canvas.shape([(-2, 51), (66, 51), (66, 67), (-2, 67)], (128, 78, 48))
    x = 64 - x
    canvas.line([(x, 30), (x, 54)], (90, 62, 44), 1.3, True)
    canvas.shape([(x - 7, 32), (x - 4, 22), (x + 4, 22), (x + 7, 32)], _hue(u[2] * 0.12 + 0.02, 0.6), bright=True)


def mountains(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws mountains; u: numbers in [0, 1) that vary it."""
    canvas.bands((150, 168, 226), (232, 214, 236), 0, 50)
    for index, x in enumerate((32, 2 + 8 * u[0], 54 + 8 * u[1])):
        top, half = (20, 20) if index == 0 else (7 + 9 * u[index + 2], 22)
        color = (122, 122, 152) if index == 0 else (92, 94, 126)
        canvas.shape([(x - half, 54), (x, top), (x + half, 54)], color)
        cap, share = (54 - top) * 0.3, half * 0.3
        teeth = [
            (x - share, top + cap),
            (x, top),
            (x + share, top + cap),
            (x + share / 3, top + cap * 0.7),
            (x, top + cap * 1.15),
            (x - share / 3, top + cap * 0.7),
        ]
        canvas.shape(teeth, (252, 252, 255), False, True)
    _ground(canvas, (58, 92, 78), 51, 2, u[5], 1.2)


def underwater(canvas: Canvas, u: Sequence[float]) -> None:
    """Draws the sea under water; u: numbers in [0, 1) that vary it."""
    canvas.bands((60, 196, 206), (6, 60, 116), 0, 64, 12)
    for index in range(2):
        x, y = _side(u[index], 7, 11), 12 + 14 * u[index + 2] + 18 * index
        color = ((255, 150, 40), (250, 220, 70))[index]
        canvas.shape([(x + 4, y), (x + 8, y - 3), (x + 8, y + 3)], color, bright=True)
        canvas.shape(ellipse(x, y, 5.5, 3.2, 16), color, bright=True)
        canvas.shape(ellipse(x - 3, y - 0.6, 0.9, 0.9, 8), (20, 20, 40), False)
    for index in range(4):
        x, phase = (3, 10, 54, 61)[index] + 2 * (u[index + 4] - 0.5), 6.28 * u[index + 4]
        y = np.linspace(66, 42 + 8 * u[index + 6], 8)
        canvas.line(np.stack([x + 1.6 * np.sin(y / 3 + phase), y], 1), (40, 150, 80), 2.2, True)
    for index in range(6):
        x, y = (u[index] * 64 + 11 * index) % 64, (u[index + 6] * 60 + 7 * index) % 60
        canvas.shape(ellipse(x, y, 1.5, 1.5, 10), (196, 240, 250), False, True)


BACKGROUNDS = {
    function.__name__: function
    for function in (beach, snow, city, forest, space, desert, meadow, room, mountains, underwater)
}
