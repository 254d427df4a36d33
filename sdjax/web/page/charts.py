"""Line charts as SVG, drawn in the page's own colours."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sdjax.web.page.marks import join, tag

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 150, 46, 20, 8
MOST = 300  # most points of a line


def chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Returns a chart of {name: [(x, y)]}; leaves out points that are not finite."""
    kept = {
        name: _thin([(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]) for name, line in lines.items()
    }
    kept = {name: line for name, line in kept.items() if line}
    if not kept:
        return Markup("")
    xs = [x for line in kept.values() for x, _ in line]
    ys = [y for line in kept.values() for _, y in line]
    ends = (min(xs), max(xs), min(ys), max(ys))
    drawn = [_line(i, line, ends) for i, line in enumerate(kept.values())]
    last = {name: line[-1][1] for name, line in kept.items()}
    keys = [
        tag("span", f"{name} {_short(value)}", cls=f"key line{i % 4}") for i, (name, value) in enumerate(last.items())
    ]
    svg = tag("svg", *_axes(ends), *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", tag("b", title), *keys), svg, cls="chart")


def _thin(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    every = -(-len(line) // MOST) or 1
    return line[::-every][::-1]


def _line(i: int, line: Sequence[tuple[float, float]], ends: tuple[float, float, float, float]) -> Markup:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_place(point, ends) for point in line))
    made = [tag("polyline", points=points, cls=f"line{i % 4}", fill="none")]
    x, y = _place(line[-1], ends)
    made.append(tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.5", cls=f"dot{i % 4}"))
    return join(made)


def _place(point: tuple[float, float], ends: tuple[float, float, float, float]) -> tuple[float, float]:
    left, right, low, high = ends
    x = (point[0] - left) / ((right - left) or 1)
    y = (point[1] - low) / ((high - low) or 1)
    return LEFT + x * (WIDTH - LEFT - 8), TOP + (1 - y) * (HEIGHT - TOP - BOTTOM)


def _axes(ends: tuple[float, float, float, float]) -> list[Markup]:
    left, right, low, high = ends
    made = []
    for share in (0.0, 0.5, 1.0):
        y = TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)
        made.append(tag("line", x1=LEFT, x2=WIDTH - 8, y1=f"{y:.1f}", y2=f"{y:.1f}", cls="grid-line"))
        made.append(tag("text", _short(low + share * (high - low)), x=LEFT - 5, y=f"{y + 3:.1f}", text_anchor="end"))
    for value, x, anchor in ((left, LEFT, "start"), (right, WIDTH - 8, "end")):
        made.append(tag("text", _short(value), x=x, y=HEIGHT - 5, text_anchor=anchor))
    return made


def _short(value: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
