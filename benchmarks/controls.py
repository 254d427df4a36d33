"""Trains ControlNets of the embedded model for four kinds of conditions and measures whether pictures follow them.

    python benchmarks/controls.py train scribble lines openpose depth      # outputs/controls/KIND/export
    python benchmarks/controls.py judge                                    # table.json, and controls.png

sdjax.conditions computes scribble (a sketch) and lines (a blueprint) from the picture; openpose (a skeleton) and depth
are drawn from Pocketland's data of the person.  The figure is the F1 of Canny edges, pixel by pixel, on people and
scenes of the held-out split: generated pictures against the pictures that the conditions belong to.  It is measured
with each ControlNet and without, for the same words and noise; 95 % intervals are over pictures.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import embedded

import sdjax
from sdjax import conditions
from sdjax.conditions import canny, openpose
from sdjax.data import pocketland
from sdjax.data.batches import Data
from sdjax.data.pocketland import face
from sdjax.data.pocketland.canvas import FINE, Canvas
from sdjax.data.sources.source import Examples, Source
from sdjax.formats import pipeline
from sdjax.images import grid
from sdjax.methods.controlnet import ControlNet
from sdjax.runtime import compile_cache
from sdjax.stable_diffusion import to_pixels
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train

KINDS = ("scribble", "lines", "openpose", "depth")
HELDOUT = pocketland.HELDOUT[0] + 7_000_000
SEEN, JUDGED, SHOWN = 3000, 64, 6
THRESHOLDS = 60, 120  # of Canny's edges; low, because drawings of 64 pixels are soft


class Depths(Canvas):
    """A canvas on which later shapes, which are nearer, are lighter."""

    def __init__(self) -> None:
        super().__init__("mosaic", embedded.SIDE)
        self.drawn = 0

    def shape(self, points, color, edge=True, bright=False):
        self.drawn += 1
        self.pen.polygon(self._points(points), (min(255, 60 + 6 * self.drawn),) * 3)

    def line(self, points, color, width, bright=False):
        return None


def depth(who: pocketland.Face, place: pocketland.Scene) -> np.ndarray:
    """Returns the depth map of a person's picture, uint8 [S S 3]: near is light, the background black."""
    canvas = Depths()
    face.draw_face(canvas, who, place)
    return np.asarray(canvas.image.resize((embedded.SIDE, embedded.SIDE), Image.Resampling.BOX))


def skeleton(who: pocketland.Face, place: pocketland.Scene) -> np.ndarray:
    """Draws a person's OpenPose points, uint8 [S S 3]: nose, neck, shoulders, eyes and ears."""
    part, canvas = face.layout(who, place), Canvas("photo", embedded.SIDE)
    middle = face.pose(canvas, place, 4.0 if place.accessory == "hat" else 0.0)
    head = {0: (1.35 * part.shift, part.nose_y), 1: (0, 1.05 * part.b)}
    for side, eye, ear in ((-1, 14, 16), (1, 15, 17)):
        head[eye] = side * part.eye_x + part.shift, part.eye_y
        head[ear] = side * part.a, part.eye_y + 1.5
    points = np.zeros((openpose.POINTS, 3), np.float32)
    for i, place_ in head.items():
        points[i] = *(np.array(canvas._points([place_])) / FINE), 1
    for i, side in ((2, -1), (5, 1)):
        points[i] = *(canvas.unit * np.array([middle[0] + 17 * side, middle[1] + 1.1 * part.b + 5.5])), 1
    return openpose.drawn([points], (embedded.SIDE, embedded.SIDE))


def condition(kind: str, who: pocketland.Face, place: pocketland.Scene) -> np.ndarray:
    """Returns the condition of a kind for a person's picture, uint8 [S S 3]."""
    drawn = {"depth": depth, "openpose": skeleton}
    return drawn[kind](who, place) if kind in drawn else conditions.of(kind).make(embedded.draw(who, place))


def person(i: int, first: int = 0) -> tuple[pocketland.Face, pocketland.Scene]:
    """Returns person number i in a scene."""
    return pocketland.identity(first + i, "face"), pocketland.scene(first + 31 * i)


@dataclass(frozen=True)
class Drawn(Source):
    """Pocketland people, each with a condition; data.path=drawn."""

    kind: str = "scribble"

    def matches(self, path: str) -> bool:
        """Returns whether a path is "drawn"."""
        return path == "drawn"

    def open(self, data: Data) -> Examples:
        """Returns the people."""
        return People(self.kind)


class People(Examples):
    """Pictures, latents and conditions of SEEN people, drawn and encoded once."""

    def __init__(self, kind: str) -> None:
        self.people = [person(i) for i in range(SEEN)]
        self.pictures = np.stack([embedded.draw(*one) for one in self.people])
        self.conditions = np.stack([condition(kind, *one) for one in self.people])
        sd = pipeline.load("pocket")
        moments = jax.jit(lambda sd, x: sd.moments(x))
        parts = [moments(sd, to_pixels(part)) for part in np.split(self.pictures, SEEN // 100)]
        self.moments = np.concatenate([np.asarray(part, np.float16) for part in parts])

    def __len__(self) -> int:
        return len(self.people)

    def shape(self, i):
        return embedded.SIDE, embedded.SIDE

    def picture(self, i, size):
        return self.pictures[i]

    def caption(self, i, random):
        return pocketland.caption(*self.people[i], int(random.integers(1 << 31)))

    def other(self, i, random):
        return i

    def example(self, i, size, random):
        kept = {"picture": self.pictures[i], "moments": self.moments[i], "condition": self.conditions[i]}
        return {**kept, "caption": self.caption(i, random)}

    def fingerprint(self):
        return ["people", len(self)]

    def about(self):
        return f"{len(self)} drawn people"


def settings(kind: str, steps: int) -> Train:
    """Returns the settings of a run that trains a ControlNet of one kind."""
    return Train(
        model="pocket",
        method=ControlNet(),
        data=Data(path="drawn", source=Drawn(kind), condition="files", batch=8, dropout=0.5),
        optim=Optim(kind="muon", lr=5e-3, schedule="cosine", warmup=10, weight_decay=0.0),  # AdamW takes far more steps
        steps=steps,
        min_snr=1.0,  # noisy times show where things are
        checkpoint=0,
        preview=0,
    )


# ---- judging -------------------------------------------------------------------------------------


def f1(made: np.ndarray, true: np.ndarray) -> float:
    """Returns the F1 of two pictures' edges, pixel by pixel, 0 to 1."""
    found, wanted = (canny.edges(picture, *THRESHOLDS) for picture in (made, true))
    return float(2 * (found & wanted).sum() / max(found.sum() + wanted.sum(), 1))


def interval(values: list[float]) -> list[float]:
    """Returns [mean, low, high]: the mean and its 95 % interval."""
    mean, half = np.mean(values), 1.96 * np.std(values, ddof=1) / len(values) ** 0.5
    return [round(float(x), 4) for x in (mean, mean - half, mean + half)]


def judge(out: Path) -> None:
    """Judges the ControlNets in a folder; writes table.json and controls.png there."""
    sd, people = sdjax.load("pocket"), [person(i, HELDOUT) for i in range(JUDGED)]
    words = [pocketland.caption(*one, i) for i, one in enumerate(people)]
    true = [embedded.draw(*one) for one in people]

    def made(control=()):
        return sdjax.text2img(sd, words, seeds=list(range(JUDGED)), steps=20, guidance=3.0, control=control)

    base = made()
    table, rows = {"none": interval([f1(*pair) for pair in zip(base, true, strict=True)])}, [true[:SHOWN], base[:SHOWN]]
    labels = ["the picture that conditions come from", "without"]
    for kind in [kind for kind in KINDS if (out / kind / "export").is_dir()]:
        seen = [condition(kind, *one) for one in people]
        pictures = made(sdjax.load_control(out / kind / "export").on(seen))
        table[kind] = interval([f1(*pair) for pair in zip(pictures, true, strict=True)])
        rows += [seen[:SHOWN], pictures[:SHOWN]]
        labels += [kind, "with it"]
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    Image.fromarray(grid.sheet([list(row) for row in rows], labels)).save(out / "controls.png")
    print(json.dumps(table))


def main() -> None:
    """Trains or judges the ControlNets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "judge"))
    parser.add_argument("kinds", nargs="*", help=", ".join(KINDS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("outputs/controls"))
    options = parser.parse_args()
    compile_cache.keep()
    for kind in options.kinds or KINDS if options.what == "train" else ():
        begin, used = time.monotonic(), time.process_time()
        train(settings(kind, options.steps), options.out / kind)
        print(f"{kind}: {time.monotonic() - begin:.0f} s, {time.process_time() - used:.0f} s of CPU")
    if options.what == "judge":
        judge(options.out)


if __name__ == "__main__":
    main()
