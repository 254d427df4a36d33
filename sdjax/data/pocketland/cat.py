"""The drawing of a cat's head on a Canvas.

draw_cat(canvas, animal, place)
"""

import numpy as np

from sdjax.data.pocketland.accessories import wear_glasses, wear_hat, wear_scarf
from sdjax.data.pocketland.canvas import Canvas, Color, ellipse, mix
from sdjax.data.pocketland.face import pose
from sdjax.data.pocketland.world import Cat, Scene, head_size


def draw_cat(canvas: Canvas, who: Cat, place: Scene) -> None:
    """Draws a cat onto the canvas."""
    a, b = head_size(who)
    coat, second = (tuple(255 * channel for channel in rgb) for rgb in (who.coat, who.second))
    pose(canvas, place, 7.0 if place.accessory == "hat" else 4.0)
    canvas.solid(
        [(-0.8 * a, 0.4 * b), (0.8 * a, 0.4 * b), (1.1 * a, b + 30), (-1.1 * a, b + 30)], mix(coat, (10, 0, 10), 0.15)
    )
    _ears(canvas, who, a, b, coat)
    if place.accessory == "scarf":
        wear_scarf(canvas, place, a, b)
    angle = np.arange(40) * (2 * np.pi / 40)
    c, s = np.cos(angle), np.sin(angle)
    cheek = 1 + 0.16 * who.cheek * np.exp(-((s - 0.45) ** 2) / 0.1)
    canvas.solid(np.stack([a * c * cheek, b * s], 1), coat)
    eye_x, eye_y = a * (0.4 + 0.14 * who.eye_spacing), b * (-0.2 + 0.22 * who.eye_height)
    _markings(canvas, who, a, b, eye_x, eye_y, coat, second)
    _muzzle(canvas, who, a, b, coat, place)
    shift = 2.2 * place.yaw
    half = 2.4 + 1.8 * who.eye_size
    tall = half * (0.65 + 0.45 * who.eye_open)
    eyes = [(-eye_x + shift, eye_y), (eye_x + shift, eye_y)]
    for side, (x, y) in zip((-1, 1), eyes, strict=True):
        turn = np.array([[1, -side * 0.5 * (who.eye_tilt - 0.3)], [0, 1]])
        canvas.shape(
            ellipse(0, 0, half, tall, 20) @ turn + (x, y), tuple(255 * channel for channel in who.iris), bright=True
        )
        canvas.shape(ellipse(x + 0.3 * half * place.gaze, y, 0.85, 0.85 * tall, 12), (14, 12, 20), edge=False)
    if place.accessory == "glasses":
        wear_glasses(canvas, place, eyes, min(max(half + 1.2, 4.2), eye_x - 0.2), a, coat)
    if place.accessory == "hat":
        wear_hat(canvas, place, 0.72 * a, b, -0.62)


def _ears(canvas: Canvas, who: Cat, a: float, b: float, coat: Color) -> None:
    tall, wide = 7 + 7 * who.ear_size, 5 + 3 * who.ear_width
    x = a * (0.5 + 0.2 * who.ear_spread)
    for side in (-1, 1):
        outer = np.array([(-wide, 0), (1.5 + 3 * who.ear_spread, -tall), (wide, 1)])
        for share, ink in ((1.0, coat), (0.55, mix(coat, (236, 120, 130), 0.7))):
            canvas.shape((outer * share) * (side, 1) + (side * x, -0.62 * b), ink, edge=share == 1.0)


def _markings(
    canvas: Canvas, who: Cat, a: float, b: float, eye_x: float, eye_y: float, coat: Color, second: Color
) -> None:
    if who.pattern == "striped":
        width = 1.3 + 1.2 * who.pattern_size
        for x in (-0.28, 0.0, 0.28):
            canvas.line([(x * a, -0.94 * b), (x * 0.8 * a, -0.5 * b)], second, width)
        for side in (-1, 1):
            for y in (0.05, 0.35):
                canvas.line([(side * 0.98 * a, y * b), (side * 0.68 * a, (y + 0.05) * b)], second, width)
    elif who.pattern == "masked":
        for side in (-1, 1):
            canvas.shape(
                ellipse(
                    side * (eye_x + 0.5), eye_y - 0.5, 4.8 + 1.4 * who.pattern_size, 4.4 + 2 * who.pattern_size, 18
                ),
                second,
                edge=False,
            )


def _muzzle(canvas: Canvas, who: Cat, a: float, b: float, coat: Color, place: Scene) -> None:
    x, y = 2.2 * place.yaw, 0.42 * b
    pale = mix(coat, (255, 248, 238), 0.35 + 0.45 * who.muzzle_tone)
    wide = 0.26 * a + 0.16 * a * who.muzzle
    for side in (-1, 1):
        canvas.shape(ellipse(x + side * 0.62 * wide, y + 2, wide, 0.3 * b, 18), pale, edge=False)
    ink, size = (60, 26, 34), 1.5 + 1.4 * who.nose
    if place.mouth_open > 0.2:
        canvas.shape(ellipse(x, y + 4.5, 2.0, 1.0 + 1.6 * place.mouth_open, 12), (150, 40, 60), edge=False)
    smile = 0.6 + 0.8 * place.smile
    canvas.line(
        [(x - 3.4, y + 3.6 - smile), (x - 1.4, y + 3.8), (x, y + 2), (x + 1.4, y + 3.8), (x + 3.4, y + 3.6 - smile)],
        ink,
        0.8,
        True,
    )
    nose = mix((238, 130, 140), (70, 40, 46), who.nose_color)
    canvas.shape([(x - size, y - 0.6), (x + size, y - 0.6), (x, y + 1.6)], nose, edge=False, bright=True)
    long = 6 + 7 * who.whiskers
    for side in (-1, 1):
        for rise in (-1.2, 0.9):
            start = (x + side * wide, y + 2 + rise * 0.6)
            canvas.line([start, (start[0] + side * long, start[1] + rise * 1.5)], (236, 236, 240), 0.6, True)
