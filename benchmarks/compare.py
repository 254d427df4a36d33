"""Every way to personalise a model, side by side: the same picture, prompts and seeds; one figure and one table.

    make compare                                         people of Pocketland that the model has never seen, judged
    make compare ARGS="--image photo.png"                one picture of your own: times and pictures, no judges

Writes OUT/grid.png (a row for each method), OUT/table.md and OUT/table.json.  Seconds are of tuning, with compilation
for the first person and without for the others.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import judges
import pocket

import sdjax.settings
from sdjax.data import pocketland
from sdjax.data.batches import Data
from sdjax.formats import pipeline
from sdjax.formats.adapters import e4t
from sdjax.images import grid, reading
from sdjax.methods.chain import Chain
from sdjax.methods.full import Full
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.runtime import compile_cache
from sdjax.sampling import generate
from sdjax.sampling.latents import latent_shape
from sdjax.training.loop import Train, train
from sdjax.training.optim import Optim
from sdjax.training.run import fresh

RECIPES = Path(__file__).parents[1] / "configs"


def methods(model, domain):
    """Returns {name: (word, settings)}; settings None for no tuning at all."""
    word = TextualInversion("<new>", domain)
    data = Data(word="<new>", templates="face", batch=16)
    quiet = {"model": model, "checkpoint": 0, "log": 1, "data": data}
    recipe = "pocket/tune.py" if model == "pocket" else "e4t_tune.py"
    tune = sdjax.settings.load(RECIPES / recipe, [f"model={model}", f"init={model}"])
    return {
        "without": (f"a {domain}", None),
        "textual inversion, 150 steps": (
            "<new>", Train(method=word, optim=Optim(lr=5e-3, weight_decay=0.0), steps=150, **quiet),
        ),
        "DreamBooth with a new word, 15 steps": (
            "<new>", Train(method=Chain((word, Full(("unet",)))), optim=tune.optim, steps=15, **quiet),
        ),
        "E4T, encoder alone": ("*s", replace(tune, steps=0)),
        "E4T, 15 steps": ("*s", tune),
    }  # fmt: skip


def personalised(settings, path, out):
    """Returns (the model personalised on the picture in `path`, seconds)."""
    start = time.monotonic()
    if settings.steps == 0:
        sd, folder = pipeline.load(settings.model), pipeline.locate(settings.model)
        size = latent_shape(sd)[0] * sd.factor
        return e4t.personalise(sd, folder, reading.subject(path, size)), time.monotonic() - start
    return train(replace(settings, data=replace(settings.data, path=str(path))), fresh(out)), time.monotonic() - start


def pictures(sd, word):
    """Returns the pictures uint8 [8 H W 3] of a word in pocket.PLACES."""
    return generate.text2img(sd, pocket.texts(word), seeds=range(len(pocket.PLACES)), **pocket.SAMPLING)


def judged(judge, who, number, made, picture):
    """Returns {"identity", "prompts"} of the pictures made of one person: similarity to others 0, to the truth 1."""
    scenes = [pocketland.scene(pocket.SCENES + 20_000 + 8 * number + k, *p) for k, p in enumerate(pocket.PLACES)]
    other = pocketland.identity(pocket.HELDOUT + 60_000 + number)
    asked = judges.identity(judge, picture[None])[0]
    s, s1, s0 = (
        judges.identity(judge, np.stack(some)) @ asked
        for some in (made, *([pocketland.draw(p, scene) for scene in scenes] for p in (who, other)))
    )
    seen = judges.classify(judge, made)
    kinds = ("context", "style", "accessory")
    right = [
        seen[kind][i] == word for i, place in enumerate(pocket.PLACES) for kind, word in zip(kinds, place, strict=True)
    ]
    return {"s": float(s.mean()), "s0": float(s0.mean()), "s1": float(s1.mean()), "prompts": float(np.mean(right))}


def summary(rows):
    """Returns what the table says of one method."""
    found = {"seconds, first": round(rows[0]["seconds"], 1)}
    if len(rows) > 1:
        found["seconds, others"] = round(float(np.median([row["seconds"] for row in rows[1:]])), 1)
    if "s" in rows[0]:
        s, s0, s1 = (np.mean([row[name] for row in rows]) for name in ("s", "s0", "s1"))
        found["identity"] = round(float((s - s0) / (s1 - s0)), 3)
        found["prompts"] = round(float(np.mean([row["prompts"] for row in rows])), 3)
    return found


def main():
    """Compares, writes figure and table, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a model with an e4t/ folder")
    parser.add_argument("--image", help="one picture; default: drawn people that the model has never seen")
    parser.add_argument("--domain", default="face", help="what the picture shows")
    parser.add_argument("--people", type=int, default=4, help="how many drawn people")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"), help="folder")
    options = parser.parse_args()
    compile_cache.keep()
    options.out.mkdir(parents=True, exist_ok=True)
    people = (
        [None] if options.image else [pocketland.identity(pocket.HELDOUT + 50_000 + i) for i in range(options.people)]
    )
    judge, table, sheets = None if options.image else judges.load(), {}, {}
    for name, (word, settings) in methods(options.model, options.domain).items():
        rows = []
        for number, who in enumerate(people):
            path = options.image or options.out / f"person-{number}.png"
            if who is not None:
                place = pocketland.scene(pocket.SCENES + 50_000 + number, "room", "photo", "none")
                Image.fromarray(pocketland.draw(who, place)).save(path)
            sd, seconds = (pipeline.load(options.model), 0.0) if settings is None else personalised(
                settings, path, options.out / "run"
            )  # fmt: skip
            made = pictures(sd, word)
            row = {"seconds": seconds}
            if who is not None:
                row |= judged(judge, who, number, made, np.asarray(Image.open(path)))
            rows.append(row)
            if number == 0:
                sheets[name] = list(made)
        table[name] = summary(rows)
        print(f"{name}: {table[name]}", flush=True)
    heads = list(next(iter(table.values())))
    lines = ["| method | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    lines += [f"| {name} | " + " | ".join(str(row[head]) for head in heads) + " |" for name, row in table.items()]
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    (options.out / "table.json").write_text(json.dumps(table, indent=1))
    columns = [" ".join(word for word in place if word != "none") for place in pocket.PLACES]
    Image.fromarray(grid.sheet(list(sheets.values()), list(sheets), columns)).save(options.out / "grid.png")
    print("\n".join(lines) + f"\nlook at {options.out / 'grid.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
