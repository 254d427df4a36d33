"""Draws identity against seconds, from compare.py's figures after several numbers of steps.

    python benchmarks/compare.py --only "E4T, 1" "DreamBooth, 1" --people 8 --marks 0 2 5 10 20 --out outputs/curves
    python benchmarks/curves.py outputs/curves/heldout/people.json --out outputs/curves

Seconds are processor seconds of preparation and steps, without compilation, so a busy machine hardly changes them.
Identity is the mean over people, seconds are the median.  Writes curves.png and curves.json: the curves, and for each
pair of ways the seconds at the largest identity that both reach, interpolated linearly between measured points.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent))
import pocket
from published import published

COLORS = ("crimson", "steelblue", "darkorange", "seagreen", "purple")
WIDTH, HEIGHT, EDGE = 640, 400, 50
Curve = list[dict]  # a point per number of steps: "steps", "seconds", "identity", "interval", "prompts"


def curves(people: dict[str, list[dict]]) -> dict[str, Curve]:
    """Returns {way: curve} from {"WAY @ steps": figures of each person}."""
    found: dict[str, Curve] = {}
    for label, rows in people.items():
        way, _, steps = label.partition(" @ ")
        if steps:
            s, s0, s1 = (np.array([row[name] for row in rows]) for name in ("s", "s0", "s1"))
            identity = (s - s0.mean()) / (s1.mean() - s0.mean())
            found.setdefault(way, []).append({
                "steps": int(steps), "seconds": round(float(np.median([row["processor"] for row in rows])), 2),
                "identity": round(float(identity.mean()), 4), "interval": pocket.interval(identity),
                "prompts": round(float(np.mean([row["prompts"] for row in rows])), 4),
            })  # fmt: skip
    return {way: sorted(curve, key=lambda point: point["steps"]) for way, curve in found.items()}


def seconds_at(curve: Curve, identity: float) -> float:
    """Returns the seconds after which a curve first reaches an identity; NaN if it never does."""
    for one, other in itertools.pairwise(curve):
        if other["identity"] >= identity:
            rise = other["identity"] - one["identity"]
            share = (identity - one["identity"]) / rise if rise > 0 else 0.0
            return round(one["seconds"] + max(share, 0.0) * (other["seconds"] - one["seconds"]), 2)
    return float("nan")


def compared(found: dict[str, Curve]) -> list[dict]:
    """Returns for each pair of ways {"identity": the largest that both reach, way: seconds until then}."""
    rows = []
    for one, other in itertools.combinations(found, 2):
        both = min(max(point["identity"] for point in found[way]) for way in (one, other))
        rows.append({"identity": both, **{way: seconds_at(found[way], both) for way in (one, other)}})
    return rows


def drawn(found: dict[str, Curve]) -> Image.Image:
    """Draws the curves: identity as thick lines with intervals, prompts as thin lines."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    most = max(point["seconds"] for curve in found.values() for point in curve)

    def at(seconds, value):
        return EDGE + seconds / most * (WIDTH - 2 * EDGE), HEIGHT - EDGE - max(value, 0) * (HEIGHT - 2 * EDGE)

    for value in (0, 0.25, 0.5, 0.75, 1):
        draw.line([at(0, value), at(most, value)], fill="lightgray")
        draw.text((10, at(0, value)[1] - 6), f"{value:.2f}", fill="black")
    for seconds in _ticks(most):
        draw.text((at(seconds, 0)[0] - 6, HEIGHT - EDGE + 8), f"{seconds:g}", fill="black")
    for number, (color, (way, curve)) in enumerate(zip(COLORS, found.items(), strict=False)):
        draw.line([at(point["seconds"], point["identity"]) for point in curve], fill=color, width=4)
        draw.line([at(point["seconds"], point["prompts"]) for point in curve], fill=color, width=1)
        for point in curve:
            draw.line([at(point["seconds"], end) for end in point["interval"]], fill=color)
        draw.text((EDGE + 190 * number, 14), f"{way} (thin: prompts)", fill=color)
    draw.text((WIDTH // 2 - 100, HEIGHT - 20), "processor seconds of one subject", fill="black")
    return sheet


def _ticks(most: float) -> Iterable[float]:
    """Returns about five round numbers from 0 to most."""
    step = max(round(most / 5), 1)
    return range(0, int(most) + 1, step)


def main() -> None:
    """Reads people.json, draws the curves and compares the ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("people", type=Path, help="people.json of compare.py --marks")
    parser.add_argument("--out", type=Path, default=Path("outputs/curves"), help="folder")
    parser.add_argument("--docs", type=Path, help="also write curves.json and curves.webp here")
    options = parser.parse_args()
    found = curves(json.loads(options.people.read_text()))
    options.out.mkdir(parents=True, exist_ok=True)
    picture, result = drawn(found), {"curves": found, "at equal identity": compared(found)}
    picture.save(options.out / "curves.png")
    published(options.docs, "curves", result, picture)
    (options.out / "curves.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["at equal identity"], indent=1))


if __name__ == "__main__":
    main()
