"""Measures the embedded model with independent judges, on held-out identities, prompts and seeds.

    python benchmarks/pocket.py vae                          PSNR of reconstructions
    python benchmarks/pocket.py prompts                      400 prompts: share of the named things that pictures show
    python benchmarks/pocket.py e4t --identities 64          identity and prompts, 0-15 steps, with encoder and without
    python benchmarks/pocket.py e4t --arm encoder            one arm alone; the other arm's run then draws both curves

--model: a folder instead of the embedded model, for pictures of any size.  Results go to OUT/NAME.json, curves to
NAME.png.
An arm of e4t keeps the pictures of each person; a rerun with the same weights and settings makes the missing ones.  The
judges read all pictures at the end, so another judge needs no new pictures.
Make choices with --split validation; published figures come from --split heldout.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import embedded
import judges

from sdjax import settings, trees
from sdjax.data import batches, pocketland
from sdjax.formats import pipeline
from sdjax.formats.adapters import kinds
from sdjax.formats.storage import files
from sdjax.images import grid
from sdjax.methods.chain import Chain
from sdjax.methods.e4t import plain_model
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.runtime import compile_cache
from sdjax.sampling import generate
from sdjax.stable_diffusion import to_pictures, to_pixels
from sdjax.training import optim, run_folder
from sdjax.training.step import default_loss, initial_state, make_step

SPLITS = {  # first seeds, not used by training or by the judges' own figures: for final figures, for choices
    "heldout": pocketland.HELDOUT[0] + 3_000_000,
    "validation": pocketland.VALIDATION[0] + 3_000_000,
}
HELDOUT = SPLITS["heldout"]
SCENES = 80_000_000
SAMPLING = {"steps": 20, "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 5.0}
MARKS = (0, 5, 10, 15)
PLACES = (  # of the 8 prompts per identity: context, style, accessory
    ("beach", "photo", "none"), ("forest", "pencil", "none"), ("snow", "watercolor", "none"), ("city", "neon", "none"),
    ("meadow", "mosaic", "hat"), ("space", "comic", "none"), ("desert", "photo", "glasses"), ("room", "photo", "scarf"),
)  # fmt: skip
WORN = {accessory: k for k, (_, _, accessory) in enumerate(PLACES) if accessory != "none"}
SEEDS = (0, 1)
ARMS = ("encoder", "without")


def interval(values, draws=2000):
    """Returns the 95 % bootstrap interval of a mean, (low, high)."""
    values, random = np.asarray(values, float), np.random.default_rng(0)
    means = values[random.integers(len(values), size=(draws, len(values)))].mean(1)
    return [round(float(x), 4) for x in np.percentile(means, (2.5, 97.5))]


def first(options):
    """Returns the first seed of the split's identities."""
    return SPLITS[options.split]


def vae(options):
    """Returns the mean PSNR of the split's pictures, encoded, decoded and rounded to bytes: 10 log10(255^2 / mse)."""
    sd = pipeline.load(options.model)
    count, size = options.count or 256, embedded.side(sd)
    pictures = np.stack([
        pocketland.draw(pocketland.identity(first(options) + i), pocketland.scene(SCENES + i), size)
        for i in range(count)
    ])  # fmt: skip
    again = jax.jit(lambda sd, x: sd.decode(sd.encode(x)))
    made = np.concatenate([to_pictures(again(sd, to_pixels(pictures[i : i + 32]))) for i in range(0, count, 32)])
    error = np.mean((made.astype(float) - pictures) ** 2, axis=(1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-3))
    Image.fromarray(grid.sheet([list(pictures[:16]), list(made[:16])])).save(options.out / "vae.png")
    return {"pictures": count, "psnr": round(float(psnr.mean()), 2), "interval": interval(psnr)}


def named(index, start):
    """Returns {kind: word} of prompt `index`, about identity start + index: scenes in turn, random words of looks."""
    place = pocketland.scene(
        SCENES + index,
        pocketland.CONTEXTS[index % 10],
        pocketland.STYLES[index // 10 % 6],
        pocketland.ACCESSORIES[index // 60 % 4],
    )
    words = pocketland.named(pocketland.identity(start + index), place, SCENES + index)
    return words


def prompts(options):
    """Returns the share of the prompts' words that the judges see, in all and per kind, and of prompts all right."""
    sd, judge = pipeline.load(options.model), judges.load(options.judges)
    wanted = [named(i, first(options)) for i in range(options.count or 400)]
    texts = [pocketland.prompt(words, SCENES + i) for i, words in enumerate(wanted)]
    made = np.concatenate([
        generate.text2img(sd, texts[i : i + 20], seeds=range(i, i + len(texts[i : i + 20])), **SAMPLING)
        for i in range(0, len(texts), 20)
    ])  # fmt: skip
    seen = judges.classify(judge, made)
    judged = set(seen) - {"domain"}  # every prompt names a face or a cat: it would only raise the mean
    right = [
        [seen[kind][i] == word for kind, word in words.items() if kind in judged] for i, words in enumerate(wanted)
    ]
    kinds = sorted({kind for words in wanted for kind in words if kind in judged})
    table = {
        kind: round(
            float(np.mean([seen[kind][i] == words[kind] for i, words in enumerate(wanted) if kind in words])), 4
        )
        for kind in kinds
    }
    Image.fromarray(grid.sheet(_rows(made[:80], 10))).save(options.out / "prompts.png")
    share = [float(np.mean(row)) for row in right]
    return {
        "prompts": len(texts), "right": round(float(np.mean(share)), 4), "interval": interval(share),
        "all right": round(float(np.mean([all(row) for row in right])), 4), "kinds": table,
    }  # fmt: skip


class Tuner:
    """Tunes a model on one picture after another with one compiled step."""

    def __init__(self, options, with_encoder):
        recipe = Path(__file__).parents[1] / "configs" / "pocket" / "tune.py"
        self.settings = settings.load(recipe, [f"model={options.model}", f"init={options.model}", *options.overrides])
        encoder, *rest = self.settings.method.parts
        self.word = encoder.word if with_encoder else "<new>"  # without it, a new word that starts as the domain
        word = TextualInversion(self.word, encoder.domain)
        self.method = self.settings.method if with_encoder else Chain((word, *rest))
        self.data = dataclasses.replace(self.settings.data, word=self.word)
        self.with_encoder, self.sd = with_encoder, pipeline.load(options.model)
        self.tx, _ = optim.optimizer(self.settings.optim, self.settings.steps)
        step = make_step(self.method, self.tx, jax.random.key(1), loss=default_loss(self.method, self.settings))
        self.step = jax.jit(step, donate_argnums=0)

    def origin(self, split):
        """Returns the origin of the figures: {"split", "weights": their digest, "settings" of the tuning}."""
        weights = trees.digest((self.sd.parts["unet"], self.sd.parts["text_encoder"], self.sd.parts["vae"]))
        return {"split": split, "weights": weights, "settings": settings.to_json(self.settings)}

    def stages(self, path):
        """Tunes the model on the picture in `path`; yields (steps, sd) at each of MARKS.

        With the encoder it ends with ("plain", sd): the model for PyTorch, whose word is one row of the token table.
        """
        trained, frozen = self.method.split(self.sd, None if self.with_encoder else jax.random.key(0))
        if self.with_encoder:
            opened = kinds.opened(pipeline.locate(self.settings.init), self.sd)
            trained, frozen = run_folder.start(self.method, trained, frozen, self.settings.init, opened)
        data = batches.build(dataclasses.replace(self.data, path=str(path)), frozen, 0)
        if self.with_encoder:
            frozen = self.method.look(frozen, trained, jnp.asarray(data.single))
        state, stream = initial_state(trained, self.tx), data.iterate()
        for done in range(MARKS[-1] + 1):
            if done in MARKS:
                sd = self.method.join(frozen, trees.copy(state["trained"]))
                yield done, sd
            if done < MARKS[-1]:
                state, _ = self.step(state, frozen, next(stream))
        if self.with_encoder:
            yield "plain", plain_model(sd)


def e4t(options):
    """Returns identity, prompts, ranks and accessories after each number of steps, with the encoder and without it."""
    result, judge = {}, judges.load(options.judges)
    for name in ARMS:
        folder = options.out / f"e4t-{name}"
        if options.arm in (None, name):
            _make(options, name, folder)
        made = [i for i in range(options.identities) if (folder / f"{i}.npz").exists()]
        if made:
            _is_of(folder, options.split)
            rows = [_judged(judge, folder, i, first(options)) for i in made]
            result[name] = {mark: _summary([row[str(mark)] for row in rows]) for mark in _marks(name)}
            result[name]["identities"] = len(made)
    _plot({name: {mark: table[mark] for mark in MARKS} for name, table in result.items()}, options.out / "e4t.png")
    return result


def _marks(name):
    return (*MARKS, "plain") if name == "encoder" else MARKS


def _is_of(folder, split):
    """Ends the program if an arm's pictures are of another split."""
    held = json.loads((folder / "origin.json").read_text())["split"]
    if held != split:
        raise SystemExit(f"error: {folder} holds pictures of --split {held}; give another --out")


def _make(options, name, folder):
    """Writes NUMBER.npz, the pictures {steps: [16 S S 3]}, for each person that the folder lacks."""
    tuner, path = Tuner(options, name == "encoder"), folder / "origin.json"
    origin = tuner.origin(options.split)
    folder.mkdir(exist_ok=True)
    if path.exists() and json.loads(path.read_text()) != origin:
        raise SystemExit(f"error: {folder} is of {path.read_text()}, this is {origin}; give another --out")
    path.write_text(json.dumps(origin))
    missing = [i for i in range(options.identities) if not (folder / f"{i}.npz").exists()]
    for i in tqdm(missing, desc=name, unit="person", dynamic_ncols=True):
        who, picture = pocketland.identity(first(options) + 10_000 + i), folder / f"{i}.png"
        place = pocketland.scene(SCENES + 10_000 + i, style="photo", accessory="none")
        Image.fromarray(pocketland.draw(who, place, embedded.side(tuner.sd))).save(picture)
        made = {str(mark): _pictures(sd, tuner.word, i) for mark, sd in tuner.stages(picture)}
        for mark, some in made.items() if i < 8 else ():
            Image.fromarray(grid.sheet(_rows(some, len(PLACES)))).save(folder / f"{i}-{mark}.png")
        with files.new_file(folder / f"{i}.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **made)


def _rows(pictures, columns):
    """Returns pictures [N H W 3] as rows of `columns` pictures."""
    return [list(pictures[first : first + columns]) for first in range(0, len(pictures), columns)]


def texts(word):
    """Returns the 8 prompts that put a word in PLACES."""
    return [pocketland.prompt({"context": c, "style": s, "accessory": a}, subject=word) for c, s, a in PLACES]


def _pictures(sd, word, number):
    """Returns 16 pictures of the word, uint8 [16 S S 3]: PLACES with each of SEEDS."""
    seeds = [1000 * number + seed for seed in SEEDS for _ in PLACES]
    return generate.text2img(sd, texts(word) * len(SEEDS), seeds=seeds, **SAMPLING)


def _judged(judge, folder, number, start):
    """Returns the judges' figures of one person's pictures: {steps: {s, s0, s1, prompts, first of 64, accessories}}."""
    who, other = pocketland.identity(start + 10_000 + number), pocketland.identity(start + 20_000 + number)
    photo = np.asarray(Image.open(folder / f"{number}.png"))
    asked, size = judges.identity(judge, photo[None])[0], len(photo)
    scenes = [pocketland.scene(SCENES + 20_000 + 8 * number + k, *kind) for k, kind in enumerate(PLACES)]
    same, different = (
        judges.identity(judge, np.stack([pocketland.draw(p, x, size) for x in scenes])) @ asked for p in (who, other)
    )
    crowd = [who, *(pocketland.identity(start + 30_000 + 64 * number + k, hair=who, skin=who) for k in range(63))]
    view = pocketland.scene(SCENES + 30_000 + number, context="room", style="photo", accessory="none")
    gallery = judges.identity(judge, np.stack([pocketland.draw(person, view, size) for person in crowd]))
    table = {}
    for mark, made in np.load(folder / f"{number}.npz").items():
        vectors, seen = judges.identity(judge, made), judges.classify(judge, made)
        right = [
            seen[kind][i] == PLACES[i % len(PLACES)][k]
            for k, kind in enumerate(("context", "style", "accessory")) for i in range(len(made))
        ]  # fmt: skip
        table[mark] = {
            "s": float((vectors @ asked).mean()), "s0": float(different.mean()), "s1": float(same.mean()),
            "prompts": float(np.mean(right)), "first": float(((vectors @ gallery.T).argmax(1) == 0).mean()),
            **{name: float(np.mean(seen["accessory"][k :: len(PLACES)] == name)) for name, k in WORN.items()},
        }  # fmt: skip
    return table


def _summary(rows):
    s, s0, s1 = (np.array([row[name] for row in rows]) for name in ("s", "s0", "s1"))
    scores = (s - s0.mean()) / (s1.mean() - s0.mean())
    table = {"identity": scores} | {name: [row[name] for row in rows] for name in ("prompts", "first", *WORN)}
    return {name: {"mean": round(float(np.mean(x)), 4), "interval": interval(x)} for name, x in table.items()}


def _plot(result, path):
    """Draws the figures against steps, with the encoder (thick) and without it (thin)."""
    width, height, edge, margin = 640, 400, 50, 110
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def at(steps, value):
        return edge + steps / MARKS[-1] * (width - edge - margin), height - edge - max(value, 0) * (height - 2 * edge)

    for value in (0, 0.25, 0.5, 0.75, 1):
        draw.line([at(0, value), at(MARKS[-1], value)], fill="lightgray")
        draw.text((10, at(0, value)[1] - 6), f"{value:.2f}", fill="black")
    for mark in MARKS:
        draw.text((at(mark, 0)[0] - 4, height - edge + 8), str(mark), fill="black")
    ends = []
    for measure, color in (("identity", "crimson"), ("prompts", "steelblue"), ("first", "darkorange")):
        for name, table in result.items():
            points = [at(steps, row[measure]["mean"]) for steps, row in table.items()]
            draw.line(points, fill=color, width=4 if name == "encoder" else 1)
            ends.append((points[-1][1] - 6, f"{measure}, {name}", color))
    below = 0
    for y, text, color in sorted(ends):
        below = max(y, below)
        draw.text((width - margin + 6, below), text, fill=color)
        below += 13  # the next label does not cover this one
    draw.text((width // 2 - 60, height - 20), "tuning steps", fill="black")
    sheet.save(path)


def main():
    """Runs one measurement and writes its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("vae", "prompts", "e4t"))
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--identities", type=int, default=64)
    parser.add_argument("--arm", choices=ARMS, help="measure one arm only")
    parser.add_argument(
        "--split", choices=SPLITS, default="heldout", help="validation: for choices; heldout: for figures"
    )
    parser.add_argument("--count", type=int, help="pictures or prompts; default 256 and 400")
    parser.add_argument("--judges", type=Path, default=judges.FOLDER, help="folder of the judges' weights")
    parser.add_argument("--out", type=Path, default=Path("outputs/pocket-figures"))
    parser.add_argument("overrides", nargs="*", help="settings of configs/pocket/tune.py, such as optim.lr=1e-4")
    options = parser.parse_intermixed_args()
    compile_cache.keep()
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    result = {"vae": vae, "prompts": prompts, "e4t": e4t}[options.task](options)
    result |= {"model": options.model, "split": options.split, "seconds": round(time.monotonic() - begin, 1)}
    (options.out / f"{options.task}.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
