"""Hat, glasses and scarf for any head with known eyes and top.

wear_hat(canvas, place, a, b)        # a, b: half the width and height of the head
"""

import colorsys
from collections.abc import Sequence

import numpy as np

from sdjax.data.pocketland.canvas import Canvas, Color, ellipse, luma, mix
from sdjax.data.pocketland.world import Scene


def color(hue: float, lightness: float, saturation: float = 0.75) -> Color:
    """Returns RGB 0 .. 255 of a hue, lightness and saturation in [0, 1]."""
    return tuple(255 * channel for channel in colorsys.hls_to_rgb(hue % 1, lightness, saturation))


def wear_hat(canvas: Canvas, place: Scene, a: float, b: float, line: float = -0.5) -> None:
    """Draws a hat with brim and band; line: height of the brim in units of b."""
    cloth, y, tall = color(place.item_color, 0.42), line * b, 10 + 3.5 * place.item_shape
    wide, top = a * 1.13 + 0.8, a * (0.82 + 0.2 * place.item_shape)
    crown = [
        (-wide, y),
        (-top, y - tall + 1.5),
        (-top + 2, y - tall),
        (top - 2, y - tall),
        (top, y - tall + 1.5),
        (wide, y),
    ]
    canvas.solid(crown, cloth, 0.6)
    band = np.array([(-wide, y), (-wide + 0.6, y - 3.4), (wide - 0.6, y - 3.4), (wide, y)])
    canvas.shape(band, mix(cloth, (255, 250, 220), 0.75), edge=False, bright=True)
    canvas.solid(ellipse(0, y, a * 1.45 + 1.5, 2.1), cloth, 0.6)


def wear_glasses(
    canvas: Canvas, place: Scene, eyes: Sequence[tuple[float, float]], radius: float, a: float, skin: Color
) -> None:
    """Draws glasses in front of the eyes, [(x, y), (x, y)]; frames are dark on light skin and light on dark skin."""
    frame = color(place.item_color, 0.78 if luma(skin) < 120 else 0.2, 0.7)
    (x, y), (x2, y2) = eyes
    thick, square = 1.25, 0.8 + 0.25 * place.item_shape
    for side, (cx, cy) in zip((-1, 1), eyes, strict=True):
        ring = ellipse(0, 0, 1, 1)
        ring = np.sign(ring) * np.abs(ring) ** square * (radius, radius * 0.92) + (cx, cy + 0.3)
        canvas.line(np.concatenate([ring, ring[:2]]), frame, thick, True)
        canvas.line([(cx + side * radius, cy), (side * a, cy - 0.8)], frame, thick, True)
    canvas.line([(x + radius, y), (x2 - radius, y2)], frame, thick, True)


def wear_scarf(canvas: Canvas, place: Scene, a: float, b: float) -> None:
    """Draws a scarf around the neck with one end hanging down."""
    wool = color(place.item_color, 0.5, 0.85)
    light = mix(wool, (255, 255, 240), 0.7)
    y, wide = 0.78 * b, 0.72 * a + 3.5
    side = 1 if place.item_shape > 0.5 else -1
    end = np.array([(1.5, 5), (7, 5), (8.5, 24), (2, 24)]) * (side, 1) + (0, y)
    canvas.solid(end, wool, 0.6)
    canvas.shape(np.array([(2, 12), (7.6, 12), (7.9, 14.5), (2, 14.5)]) * (side, 1) + (0, y), light, False, True)
    canvas.solid(ellipse(0, y + 4.2, wide, 5.2), wool, 0.6)
    for x in (-0.66, -0.22, 0.22, 0.66):
        canvas.line([(x * wide - 1, y + 0.6), (x * wide + 1, y + 8.6)], light, 1.2, True)
