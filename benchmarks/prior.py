"""Measures prior preservation: how the class changes when the embedded model learns one member, by the judges.

    python benchmarks/prior.py --split validation --people 2        # for choices
    python benchmarks/prior.py --out docs/prior.json                # 8 held-out people

DreamBooth learns "sks face" from five photos, with nothing, with class rows drawn by the model, and with output
preservation.  Each result then makes `--count` pictures of "a photo of a face", with the same seeds:

    drift      similarity of the class's pictures to the subject, on a scale from strangers (0) to the subject (1)
    diversity  1 - mean similarity of two pictures of the class
    subject    similarity of pictures of "a photo of sks face" to the subject, on the same scale

Each figure is a mean over people with its 95 % interval (Student's t).
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import embedded
import judges
import pocket

import sdjax.settings
from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.formats.storage import files
from sdjax.runtime import compile_cache
from sdjax.sampling import generate
from sdjax.service import class_images
from sdjax.training.loop import train

ROOT = Path(__file__).parents[1]
WORD, CLASS = "sks face", "a photo of a face"
PHOTOS, FIRST = 5, 70_000  # photos of each person; offset of the people's seeds in a split
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 15: 2.131}


def settings(options, folder, classes):
    """Returns {way: a run's settings} for the pictures in a folder."""
    items = [
        "model=pocket", f"data.path={folder}", f"data.word={WORD}", f"data.batch={options.batch}", "preview=0",
        f"steps={options.steps}", f"optim.lr={options.lr}", "checkpoint=0", "log=0", "optim.weight_decay=0.0",
    ]  # fmt: skip
    base = sdjax.settings.load(ROOT / "configs" / "dreambooth.py", items)
    shown = dataclasses.replace(base.class_data, path=str(classes), count=options.classes, prompts=(CLASS,))
    half = dataclasses.replace(base.data, batch=options.batch // 2)
    return {
        "nothing": dataclasses.replace(base, data=half, preserve=0.0),
        "class rows": dataclasses.replace(base, preserve=0.0, class_data=shown),
        "output preservation": dataclasses.replace(base, data=half, preserve=options.preserve),
    }


def photos(who, number, folder):
    """Writes a person's photos and returns them."""
    folder.mkdir(parents=True)
    made = [embedded.draw(who, pocketland.scene(pocket.SCENES + 8 * number + k, style="photo", accessory="none"))
            for k in range(PHOTOS)]  # fmt: skip
    for k, picture in enumerate(made):
        Image.fromarray(picture).save(folder / f"{k}.png")
    return np.stack(made)


def pictures(sd, text, count):
    """Returns `count` pictures of a text, seeds from 1000 on."""
    seeds = range(1000, 1000 + count)
    made = [generate.text2img(sd, [text] * len(some), seeds=some, **pocket.SAMPLING)
            for some in (seeds[i : i + 16] for i in range(0, count, 16))]  # fmt: skip
    return np.concatenate(made)


def figures(judge, asked, strangers, classes, own):
    """Returns {figure: value} of one model.

    asked [n d]: vectors of the subject's photos.  strangers [m d]: vectors of other people.  classes, own: pictures of
    the class and of the subject; own=None leaves out "subject".
    """
    mean = asked.mean(0) / np.linalg.norm(asked.mean(0))
    zero, one = float((strangers @ mean).mean()), float((asked @ mean).mean())
    seen = judges.identity(judge, classes)
    pairs = seen @ seen.T
    among = (pairs.sum() - np.trace(pairs)) / (len(seen) * (len(seen) - 1))
    found = {"drift": ((seen @ mean).mean() - zero) / (one - zero), "diversity": 1 - among}
    if own is not None:
        found["subject"] = ((judges.identity(judge, own) @ mean).mean() - zero) / (one - zero)
    return {name: float(value) for name, value in found.items()}


def interval(values):
    """Returns (mean, half the width of its 95 % interval)."""
    values = np.asarray(values)
    wide = T95.get(len(values) - 1, 2.0) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(wide)


def measure(options, work):
    """Returns {way: [figures of each person]}."""
    judge, sd = judges.load(), pipeline.load("pocket")
    usual = pictures(sd, CLASS, options.count)
    first, classes, rows = pocket.SPLITS[options.split] + FIRST, work / "classes", {}
    others = [pocketland.identity(first + 5000 + i) for i in range(64)]
    scenes = [pocketland.scene(pocket.SCENES + 90_000 + i, style="photo") for i in range(64)]
    strangers = judges.identity(judge, np.stack([embedded.draw(*both) for both in zip(others, scenes, strict=True)]))
    for number in range(options.people):
        asked = photos(pocketland.identity(first + number), 1000 + number, work / str(number))
        vectors = judges.identity(judge, asked)
        rows.setdefault("the base model", []).append(figures(judge, vectors, strangers, usual, None))
        for way, run in settings(options, work / str(number), classes).items():
            if run.class_data.path and not classes.is_dir():
                class_images.draw(run, {name: str(value) for name, value in pocket.SAMPLING.items()}, 16)
            start = time.monotonic()
            tuned = train(run, work / f"{number}-{way}")
            found = figures(judge, vectors, strangers, pictures(tuned, CLASS, options.count),
                            pictures(tuned, f"a photo of {WORD}", 16))  # fmt: skip
            rows.setdefault(way, []).append({**found, "seconds": round(time.monotonic() - start, 1)})
            shutil.rmtree(work / f"{number}-{way}")
            print(number, way, {name: round(value, 3) for name, value in found.items()}, flush=True)
    return rows


def main():
    """Measures, prints a table, writes the figures as JSON, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=pocket.SPLITS, default="heldout", help="split of the people")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=8, help="batch size with class rows; half of it without")
    parser.add_argument("--preserve", type=float, default=2.0)
    parser.add_argument("--classes", type=int, default=64, help="number of class pictures to draw")
    parser.add_argument("--count", type=int, default=32, help="number of class pictures to judge")
    parser.add_argument("--out", type=Path, default=Path("outputs/prior.json"))
    options = parser.parse_args()
    compile_cache.keep()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(options, Path(work))
    table = {}
    for way, found in rows.items():
        table[way] = {name: interval([one[name] for one in found]) for name in found[0] if name != "seconds"}
        print(f"| {way} | " + " | ".join(f"{name} {m:.3f} ± {w:.3f}" for name, (m, w) in table[way].items()) + " |")
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with files.new_file(options.out) as temporary:
        temporary.write_text(json.dumps({"options": told, "mean and 95 %": table, "people": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
