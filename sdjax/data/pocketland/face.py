"""The drawing of a person's head on a Canvas: body, hair behind, head, features, hair in front, accessory.

Coordinates are pixels around the middle of the head, y down; `a` and `b` are half its width and height.

    draw_face(canvas, person, place)
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from sdjax.data.pocketland.accessories import color, wear_glasses, wear_hat, wear_scarf
from sdjax.data.pocketland.canvas import Canvas, Color, ellipse, luma, mix
from sdjax.data.pocketland.world import Face, Scene, head_size

TONES = (
    (0.0, (255, 230, 212)),
    (0.25, (240, 198, 164)),
    (0.5, (212, 152, 106)),
    (0.75, (156, 102, 68)),
    (1.0, (104, 66, 46)),
)


@dataclass
class Layout:
    """Places of the parts of one face, in pixels."""

    a: float
    b: float
    skin: Color
    hair: Color
    facial: Color  # brows and beard, in a colour distinct from the skin
    shift: float  # how far features move to the side with the head's turn
    eye_y: float
    eye_x: float
    eye: tuple[float, float]  # half width, half height
    nose_y: float
    mouth_y: float
    outline: Float64[np.ndarray, "N 2"]


def skin_color(who: Face) -> Color:
    """Returns the skin's RGB, 0 .. 255, from tone and undertone."""
    for (low, first), (high, second) in zip(TONES, TONES[1:], strict=False):
        if who.skin <= high:
            red, green, blue = mix(first, second, (who.skin - low) / (high - low))
            return min(255.0, red + 8 * (who.undertone - 0.5)), green - 10 * (who.undertone - 0.5), blue
    return TONES[-1][1]


def layout(who: Face, place: Scene) -> Layout:
    """Returns the Layout of a face in a scene."""
    a, b = head_size(who)
    skin, hair = skin_color(who), tuple(255 * channel for channel in who.hair)
    facial = hair
    if abs(luma(hair) - luma(skin)) < 45:
        facial = mix(hair, (0, 0, 0), 0.55) if luma(skin) > 90 else mix(hair, (255, 250, 245), 0.55)
    eye_y = b * (-0.14 + 0.24 * who.eye_height)
    half = 2.3 + 2.3 * who.eye_size
    eye_x = min(max(a * (0.36 + 0.2 * who.eye_spacing), half + 0.5), a - half - 0.6)
    nose_y = eye_y + b * (0.2 + 0.27 * who.nose_length)
    mouth_y = nose_y + (0.93 * b - nose_y) * (0.36 + 0.3 * who.mouth_height)
    angle = np.arange(44) * (2 * math.pi / 44)
    c, s = np.cos(angle), np.sin(angle)
    power = np.where(s > 0, 0.48 + 0.8 * who.jaw, 1.0 - 0.45 * who.forehead)
    outline = np.stack([a * np.sign(c) * np.abs(c) ** power, b * s], 1)
    return Layout(
        a,
        b,
        skin,
        hair,
        facial,
        2.4 * place.yaw,
        eye_y,
        eye_x,
        (half, half * (0.55 + 0.4 * who.eye_open)),
        nose_y,
        mouth_y,
        outline,
    )


def pose(canvas: Canvas, place: Scene, down: float = 0.0) -> Float64[np.ndarray, " 2"]:
    """Poses a head and returns its middle: tilt up to 8 degrees, size within 6 %, place within 5 pixels."""
    angle, scale = math.radians(8 * place.tilt), 1.13 + 0.07 * place.scale
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    middle = np.array([32 + 5 * place.x, 31.5 + down + 2 * place.y])
    canvas.pose(np.array([[c, s], [-s, c]]), middle)
    return middle


def draw_face(canvas: Canvas, who: Face, place: Scene) -> None:
    """Draws a person onto the canvas."""
    hat = place.accessory == "hat"
    part = layout(who, place)
    middle = pose(canvas, place, 4.0 if hat else 0.0)
    _body(canvas, part, place, middle)
    if who.hair_style == "long":
        _long_hair(canvas, who, part)
    if who.hair_style == "curly":
        _curls(canvas, who, part, hat)
    canvas.shape(
        [
            (-0.45 * part.a, 0.5 * part.b),
            (0.45 * part.a, 0.5 * part.b),
            (0.5 * part.a, part.b + 5),
            (-0.5 * part.a, part.b + 5),
        ],
        mix(part.skin, (60, 10, 20), 0.22),
    )
    if place.accessory == "scarf":
        wear_scarf(canvas, place, part.a, part.b)
    _head(canvas, who, part)
    if who.beard != "absent":
        _beard(canvas, who, part)
    _mouth(canvas, who, part, place)
    _nose(canvas, who, part)
    eyes = _eyes(canvas, who, part, place)
    if who.hair_style != "bald":
        _hair(canvas, who, part, hat)
    _brows(canvas, who, part, place)
    if place.accessory == "glasses":
        radius = min(max(part.eye[0] + 1.3, 4.4), part.eye_x - 0.2)
        wear_glasses(canvas, place, eyes, radius, part.a, part.skin)
    if hat:
        wear_hat(canvas, place, part.a, part.b)


def _body(canvas: Canvas, part: Layout, place: Scene, middle: Float64[np.ndarray, " 2"]) -> None:
    y = middle[1] + part.b * 1.1
    matrix, shift = canvas.matrix, canvas.shift
    canvas.pose(None)
    x = middle[0]
    shirt = [
        (x - 24, 67),
        (x - 21, y + 8),
        (x - 13, y + 3.5),
        (x - 6, y + 1),
        (x + 6, y + 1),
        (x + 13, y + 3.5),
        (x + 21, y + 8),
        (x + 24, 67),
    ]
    canvas.solid(shirt, color(place.cloth, 0.4, 0.35))
    canvas.pose(matrix, shift)


def _long_hair(canvas: Canvas, who: Face, part: Layout) -> None:
    a, b = part.a, part.b
    wide, end = a * (1.14 + 0.22 * who.hair_volume) + 0.8, b * (0.62 + 0.75 * who.hair_length)
    top = part.outline[22:] * (wide / a, 1.1 + 0.08 * who.hair_volume)
    flare = wide * (0.92 + 0.25 * who.hair_volume)
    canvas.solid(
        np.concatenate(
            [top, [(wide, 0), (flare, end - 2), (flare - 2, end), (2 - flare, end), (-flare, end - 2), (-wide, 0)]]
        ),
        part.hair,
        0.8,
    )


def _curls(canvas: Canvas, who: Face, part: Layout, hat: bool) -> None:
    radius, rim = 3.4 + 1.8 * who.hair_volume, 1.04 + 0.1 * who.hair_volume
    first, last = math.pi * (0.98 - 0.2 * who.hair_length), math.pi * (2.02 + 0.2 * who.hair_length)
    count = max(9, round((part.a + part.b) * 1.9 / radius * 0.85))
    dots = [(part.a * rim * math.cos(t), part.b * rim * math.sin(t)) for t in np.linspace(first, last, count)]
    dots = [(x, y) for x, y in dots if not hat or y > -0.45 * part.b]
    for x, y in dots:
        canvas.shape(ellipse(x, y, radius, radius, 14), part.hair)
    for index, (x, y) in enumerate(dots):
        tint = mix(part.hair, (255, 255, 255) if index % 2 else (0, 0, 0), 0.12)
        canvas.shape(ellipse(x, y, radius - 0.7, radius - 0.7, 12), tint, edge=False)


def _head(canvas: Canvas, who: Face, part: Layout) -> None:
    a, b, skin = part.a, part.b, part.skin
    dark = mix(skin, (70, 15, 20), 0.25)
    for side in (-1, 1):
        canvas.shape(
            ellipse(
                side * (a - 0.2 + 0.8 * who.ears), part.eye_y + 1.5, 1.3 + 2.3 * who.ears, 2.0 + 3.0 * who.ears, 14
            ),
            mix(skin, (90, 20, 20), 0.1),
        )
    canvas.solid(part.outline, skin)
    red = mix(skin, (238, 84, 96), 0.04 + 0.34 * who.blush)
    for side in (-1, 1):
        canvas.shape(ellipse(side * 0.58 * a + part.shift, part.nose_y, 0.24 * a, 0.14 * b, 14), red, edge=False)
    if who.freckles:
        brown = mix(skin, (84, 34, 12), 0.5 + 0.2 * who.freckles)
        for dx, dy in ((0.3, -0.06), (0.46, -0.13), (0.62, -0.05), (0.38, 0.08), (0.55, 0.09), (0.72, 0.05)):
            for side in (-1, 1):
                x, y = side * dx * a + part.shift, part.nose_y + dy * b
                canvas.shape(ellipse(x, y, 0.72, 0.72, 8), brown, edge=False)
    if who.mole_size:
        x, y = (who.mole_x - 0.5) * 1.3 * a + part.shift, part.nose_y + (0.15 + 0.3 * who.mole_y) * b * 0.8
        canvas.shape(ellipse(x, y, 0.5 + 0.8 * who.mole_size, 0.5 + 0.8 * who.mole_size, 10), (52, 28, 26), edge=False)
    if who.age > 0.5:
        _wrinkles(canvas, part, mix(skin, dark, 0.5 + who.age), 0.7 + 0.5 * (who.age - 0.5))


def _wrinkles(canvas: Canvas, part: Layout, ink: Color, width: float) -> None:
    a, b, x = part.a, part.b, part.shift
    for y in (-0.62, -0.48):
        canvas.line([(x - 0.4 * a, y * b), (x, y * b - 0.5), (x + 0.4 * a, y * b)], ink, width)
    for side in (-1, 1):
        eye = side * part.eye_x + x
        low = part.eye_y + part.eye[1] + 1.4
        canvas.line([(eye - 0.9 * part.eye[0], low), (eye, low + 0.8), (eye + 0.9 * part.eye[0], low)], ink, width)
        canvas.line([(side * 0.28 * a + x, part.nose_y - 0.5), (side * 0.52 * a + x, part.mouth_y + 0.5)], ink, width)


def _beard(canvas: Canvas, who: Face, part: Layout) -> None:
    a, b, x = part.a, part.b, part.shift
    if who.beard == "beard":
        outer = part.outline[1:22] * (1.03, 1.0) + np.stack(
            [np.zeros(21), np.sin(np.linspace(0, math.pi, 21)) * (0.5 + 4 * who.beard_size)], 1
        )
        top = part.nose_y + 0.3 * (part.mouth_y - part.nose_y)
        inner = [
            (-0.86 * a, 0.2 * b),
            (-0.6 * a + x, top + 1),
            (-0.2 * a + x, top),
            (0.2 * a + x, top),
            (0.6 * a + x, top + 1),
            (0.86 * a, 0.2 * b),
        ]
        return canvas.shape(np.concatenate([outer, inner]), part.facial)
    y, wide, tall = (
        part.nose_y + 0.52 * (part.mouth_y - part.nose_y),
        3.6 + 4 * who.beard_size,
        1.3 + 0.7 * who.beard_size,
    )
    lobe = [(0, -0.6), (0.5, -1), (1, 0.7), (0.55, 0.75), (0, 0.55), (-0.55, 0.75), (-1, 0.7), (-0.5, -1)]
    canvas.shape(np.array(lobe) * (wide, tall) + (x, y), part.facial)


def _mouth(canvas: Canvas, who: Face, part: Layout, place: Scene) -> None:
    half, thick = 2.8 + 4.2 * who.mouth_width, 0.55 + 1.25 * who.lip
    half = min(half, 0.62 * part.a)
    curve = 1.7 * place.smile + 2.6 * (who.mouth_rest - 0.5)
    x = np.linspace(-1, 1, 9)
    y = part.mouth_y + curve * (0.5 - x * x)
    bulge = 1 - x * x
    opening = place.mouth_open * min(3.0, 0.9 * part.b - part.mouth_y)
    red = mix(mix(part.skin, (150, 62, 52), 0.7), (214, 32, 84), who.lip_color)
    upper, lower = y - thick * bulge - 0.3, y + (thick + opening) * bulge + 0.3
    x = x * half + part.shift
    canvas.shape(np.concatenate([np.stack([x, upper], 1), np.stack([x, lower], 1)[::-1]]), red, bright=True)
    gap = np.stack([x, y + opening * bulge], 1)[::-1]
    if opening > 0.4:
        canvas.shape(np.concatenate([np.stack([x, y], 1), gap]), (72, 12, 22), edge=False)
    else:
        canvas.line(np.stack([x, y], 1), mix(red, (60, 0, 10), 0.6), 0.5)


def _nose(canvas: Canvas, who: Face, part: Layout) -> None:
    wide, y = 1.3 + 2.9 * who.nose_width, part.nose_y
    x, top = 1.35 * part.shift, part.eye_y - 0.02 * part.b
    side = mix(part.skin, (110, 36, 26), 0.2)
    canvas.shape(
        [
            (x - 0.7, top),
            (x + 0.7, top),
            (x + wide, y - 0.9),
            (x + 0.7 * wide, y + 0.5),
            (x - 0.7 * wide, y + 0.5),
            (x - wide, y - 0.9),
        ],
        side,
        edge=False,
    )
    canvas.shape(
        [(x - 0.4, top), (x + 0.5, top), (x + 0.45 * wide, y - 1.1), (x - 0.5 * wide, y - 1.1)],
        mix(part.skin, (255, 245, 235), 0.16),
        edge=False,
    )
    ink = mix(part.skin, (70, 14, 14), 0.55)
    canvas.line(
        [(x - wide, y - 0.9), (x - 0.7 * wide, y + 0.4), (x, y + 0.7), (x + 0.7 * wide, y + 0.4), (x + wide, y - 0.9)],
        ink,
        0.75,
        True,
    )


def _eyes(canvas: Canvas, who: Face, part: Layout, place: Scene) -> list[tuple[float, float]]:
    half, tall = part.eye
    lid = mix(part.skin, (40, 10, 14), 0.75)
    tilt = 0.35 * (who.eye_tilt - 0.5)
    iris_size = min(0.66 * half, tall * 0.98)
    middles = []
    for side in (-1, 1):
        x, y = side * part.eye_x + part.shift, part.eye_y
        middles.append((x, y))
        turn = np.array([[1, side * -tilt], [0, 1]])  # a shear: outer corners up
        white = ellipse(0, 0, half, tall, 20) @ turn
        canvas.shape(white + (x, y), (250, 250, 252))
        look = x + 0.28 * half * place.gaze
        canvas.shape(
            ellipse(look, y, iris_size, iris_size, 16), tuple(255 * c for c in who.iris), edge=False, bright=True
        )
        canvas.shape(ellipse(look, y, 0.45 * iris_size, 0.45 * iris_size, 12), (14, 12, 20), edge=False)
        canvas.line(white[10:] + (x, y), lid, 0.5 + 1.0 * who.lid)
    return middles


def _brows(canvas: Canvas, who: Face, part: Layout, place: Scene) -> None:
    half, thick = part.eye[0] + 0.7, 0.5 + 1.5 * who.brow_thickness
    y = part.eye_y - part.eye[1] - 1.1 - 1.8 * who.brow_gap - thick / 2
    rise = 2.6 * (who.brow_tilt - 0.5)
    for side in (-1, 1):
        x = side * part.eye_x + part.shift
        inner, outer = x - side * half, x + side * half
        points = [
            (inner, y + rise - thick / 2),
            (x, y - 0.7 - thick / 2),
            (outer, y - rise),
            (x, y - 0.7 + thick / 2),
            (inner, y + rise + thick / 2),
        ]
        canvas.shape(points, part.facial, edge=False, bright=True)


def _hair(canvas: Canvas, who: Face, part: Layout, hat: bool) -> None:
    a, b = part.a, part.b
    grow = 1.07 + 0.12 * who.hair_volume
    outer = part.outline[22:] * (grow, grow)  # left temple, over the top, right temple
    if who.hair_style == "spiky" and not hat:
        outer = outer[::2] * np.where(np.arange(11) % 2, 1.12 + 0.25 * who.hair_length, 0.98)[:, None] * (0.98, 1.0)
    side = b * (0.02 + (0.3 if who.hair_style == "short" else 0.12) * who.hair_length)
    low = -b * (0.36 + 0.3 * who.hairline)
    part_x = 1.5 * (who.parting - 0.5)
    x = np.linspace(0.9, -0.9, 9)
    line = low + b * 0.2 * (np.abs(x - part_x) ** 1.5 - 0.5)
    inner = np.stack([a * x, np.minimum(line, -0.28 * b)], 1)
    points = np.concatenate(
        [[(-a * grow, side)], outer, [(a * grow, side), (a * 0.92, side - 1)], inner, [(-a * 0.92, side - 1)]]
    )
    canvas.solid(points, part.hair, 0.0)
    if not hat:
        shine = part.outline[26:32] * (0.86, 0.9)
        canvas.line(shine, mix(part.hair, (255, 255, 255), 0.28), 1.1)
