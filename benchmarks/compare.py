"""Every way to personalise a model, side by side: the same people, prompts and seeds; one figure and one table.

    make compare                                         2 drawn people, 4 prompts
    make compare ARGS=--full                             6 people, 8 prompts, 2 seeds, with 95 % intervals
    make compare ARGS="--images photos/cat --domain cat" pictures of your own: no judges of looks
    python benchmarks/compare.py --sweep "LoRA, 5" --with "steps=50 optim.lr=1e-3" --with "steps=100 optim.lr=3e-4"

The people are held out: neither the model nor any choice of steps and rates has seen them; --sweep takes others.
Writes OUT/grid.png (a row for each prompt, a column for each way), OUT/table.md and OUT/table.json.  What is made is
kept in OUT/made, person by person; run again, the program goes on from there.
Seconds are those of the steps, without compilation, which has a column of its own.  Memory is the compiler's account of
one step.  Identity is 1 for another drawing of the person and 0 for somebody else; prompts is the share of places,
styles and accessories that are there.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import judges
import pocket
import ways

from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.formats.storage import files
from sdjax.images import grid, reading
from sdjax.methods import clip
from sdjax.runtime import compile_cache
from sdjax.sampling import generate
from sdjax.stable_diffusion import to_pixels
from sdjax.training import loop, run
from sdjax.training.optim import optimizer

PEOPLE, VIEWS = 50_000, 5  # offset of the people's seeds within a split; pictures of each
BASE = "base model"
KINDS = ("context", "style", "accessory")


@dataclass(frozen=True)
class Subject:
    """One subject: the folder of its pictures, and who it is where it is drawn."""

    folder: Path
    who: pocketland.Face | None = None
    number: int = 0


class Tuner:
    """Personalises a model in one way, on one subject after another, with one compiled step."""

    def __init__(self, way: ways.Way, options: argparse.Namespace, more: tuple[str, ...] = ()) -> None:
        self.way, self.options, self.more, self.step = way, options, more, None

    def __call__(self, path: Path) -> tuple:
        """Returns (sd, {"seconds", "compilation", "steps", "memory", "bytes"}) of the pictures in a file or folder."""
        told = self.way.settings(self.options.model, str(path), self.more)
        begun = time.monotonic()
        trained, frozen, data, _ = loop.begin(told)
        tx, evaluate = optimizer(told.optim, told.steps)
        state, stream, found = loop.initial_state(trained, tx, told.ema), data.iterate(), {"steps": told.steps}
        first = next(stream)
        found["preparation"] = time.monotonic() - begun
        if self.step is None:
            begun = time.monotonic()
            step = loop.make_step(
                told.method, tx, jax.random.key(told.seed), loss=loop.default_loss(told.method, told),
                ema=told.ema, evaluate=evaluate,
            )  # fmt: skip
            self.step = jax.jit(step, donate_argnums=0).lower(state, frozen, first).compile()
            found["compilation"] = time.monotonic() - begun
        about = self.step.memory_analysis()
        found["memory"] = (
            sum(getattr(about, f"{kind}_size_in_bytes") for kind in ("argument", "temp", "output"))
            - about.alias_size_in_bytes
        )
        begun = time.monotonic()
        for batch in [first, *(next(stream) for _ in range(told.steps - 1))]:
            state, metrics = self.step(state, frozen, batch)
        jax.block_until_ready(metrics)
        found["seconds"] = time.monotonic() - begun
        learned = state["ema"] if told.ema else evaluate(state["opt"], state["trained"])
        if told.method.finish is not None:
            frozen, learned = told.method.finish(frozen, learned, data)
        found["bytes"] = kept(told.method, frozen, learned)
        return told.method.join(frozen, learned), found


def kept(method, frozen, trained) -> int:
    """Returns the bytes of a subject's export."""
    with tempfile.TemporaryDirectory() as folder:
        path, _ = run.export(method, frozen, trained, Path(folder) / "export")
        return sum(file.stat().st_size for file in Path(path).parent.rglob("*") if file.is_file())


def subjects(options: argparse.Namespace) -> list[Subject]:
    """Returns the subjects: drawn people of a split, five pictures each, or the folder that was given."""
    if options.images:
        return [Subject(Path(options.images))]
    found, split = [], "validation" if options.sweep else "heldout"
    for number in range(options.people):
        who, folder = pocketland.identity(pocket.SPLITS[split] + PEOPLE + number), options.out / split / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        for view in range(VIEWS):
            context = ("room", "beach", "forest", "city", "meadow")[view]
            place = pocketland.scene(pocket.SCENES + PEOPLE + VIEWS * number + view, context, "photo", "none")
            Image.fromarray(pocketland.draw(who, place)).save(folder / f"{view}.png")
        found.append(Subject(folder, who, number))
    return found


def source(subject: Subject, way: ways.Way) -> Path:
    """Returns what a way trains on: the subject's folder, or its first picture alone."""
    return sorted(p for p in subject.folder.iterdir() if p.suffix == ".png")[0] if way.pictures == 1 else subject.folder


def pictures(sd, word: str, number: int, options: argparse.Namespace) -> np.ndarray:
    """Returns the pictures uint8 [seeds * prompts H W 3] of a word, the prompts of one seed together."""
    texts = pocket.texts(word)[: options.prompts]
    seeds = [1000 * number + seed for seed in range(options.seeds) for _ in texts]
    return generate.text2img(sd, texts * options.seeds, seeds=seeds, **pocket.SAMPLING)


def judged(judge, subject: Subject, made: np.ndarray, split: str) -> dict[str, float]:
    """Returns identity's three similarities and the share of what prompts name, of a person's pictures."""
    count = len(pocket.PLACES)
    places = [pocket.PLACES[i % (len(made) if len(made) < count else count)] for i in range(len(made))]
    scenes = [pocketland.scene(pocket.SCENES + 20_000 + 8 * subject.number + k, *p) for k, p in enumerate(places)]
    other = pocketland.identity(pocket.SPLITS[split] + 60_000 + subject.number)
    asked = judges.identity(judge, np.asarray(Image.open(subject.folder / "0.png"))[None])[0]
    s, s1, s0 = (
        float((judges.identity(judge, np.stack(some)) @ asked).mean())
        for some in (made, *([pocketland.draw(p, scene) for scene in scenes] for p in (subject.who, other)))
    )
    seen = judges.classify(judge, made)
    right = [seen[kind][i] == word for i, place in enumerate(places) for kind, word in zip(KINDS, place, strict=True)]
    return {"s": s, "s0": s0, "s1": s1, "prompts": float(np.mean(right))}


def seen_alike(sd, subject: Subject, made: np.ndarray) -> float:
    """Returns CLIP-I: the mean cosine between the pictures made and the subject's own, by the model's image encoder."""
    own = np.stack([np.asarray(reading.subject(p, made.shape[1])) for p in sorted(subject.folder.glob("*.png"))])
    one, other = (np.asarray(clip.embed_images(sd, to_pixels(some))) for some in (made, own))
    return float((one @ other.T).mean())


def made_of(subject, name, way, options, tuner, base) -> tuple[np.ndarray, dict]:
    """Returns (pictures, figures) of one subject in one way: those that are kept, else made now."""
    file = options.out / "made" / f"{subject.number}-{name.replace(' ', '_')}.npz"
    if file.is_file() and not options.sweep:
        held = np.load(file)
        return held["pictures"], json.loads(str(held["figures"]))
    sd, found = (base, {"steps": 0}) if way is None else tuner(source(subject, way))
    made = pictures(sd, f"a {options.domain}" if way is None else way.word, subject.number, options)
    if not options.sweep:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.new_file(file) as temporary, open(temporary, "wb") as out:
            np.savez_compressed(out, pictures=made, figures=json.dumps(found))
    return made, found


def summary(rows: list[dict]) -> dict:
    """Returns what the table says of one way."""
    table: dict = {}
    if "s" in rows[0]:
        s, s0, s1 = (np.array([row[name] for row in rows]) for name in ("s", "s0", "s1"))
        scores = (s - s0.mean()) / (s1.mean() - s0.mean())
        for name, values in (("identity", scores), ("prompts", np.array([row["prompts"] for row in rows]))):
            table[name], table[f"{name}, 95 %"] = round(float(values.mean()), 3), pocket.interval(values)
    if "clip-i" in rows[0]:
        table["CLIP-I"] = round(float(np.mean([row["clip-i"] for row in rows])), 3)
    table["steps"] = rows[0]["steps"]
    if "seconds" in rows[0]:
        table["seconds"] = round(float(np.median([row["seconds"] + row["preparation"] for row in rows])), 1)
        table["compilation"] = round(max(row.get("compilation", 0) for row in rows), 1)
        table["MB of memory"] = round(rows[0]["memory"] / 1e6)
        table["kB to keep"] = round(rows[0]["bytes"] / 1e3)
    return table


def written(table: dict[str, dict], path: Path) -> str:
    """Writes the table as JSON and Markdown; returns the latter."""
    path.with_suffix(".json").write_text(json.dumps(table, indent=1))
    heads = list(dict.fromkeys(head for row in table.values() for head in row if not head.endswith("95 %")))
    lines = ["| way | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(cell(row, head) for head in heads) + " |")
    text = "\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(text)
    return text


def cell(row: dict, head: str) -> str:
    """Returns one figure of the table, with its interval where there is one."""
    low, high = row.get(f"{head}, 95 %", (None, None))
    return f"{row.get(head, '')}" if low is None else f"{row[head]} ({low:.2f} to {high:.2f})"


def figure(columns: dict[str, np.ndarray], subject: Subject, options: argparse.Namespace) -> Image.Image:
    """Returns the figure of one subject: a row for each prompt, a column for each way, the input first."""
    own = np.asarray(Image.open(sorted(subject.folder.glob("*.png"))[0]).convert("RGB").resize(made_size(columns)))
    names = [" ".join(word for word in place if word != "none") for place in pocket.PLACES[: options.prompts]]
    rows = [[own, *(made[k] for made in columns.values())] for k in range(options.prompts)]
    return Image.fromarray(grid.sheet(rows, names, ["input", *columns], scale=2))


def made_size(columns: dict[str, np.ndarray]) -> tuple[int, int]:
    """Returns (width, height) of the pictures."""
    height, width = next(iter(columns.values())).shape[1:3]
    return width, height


def compare(options: argparse.Namespace) -> int:
    """Makes, judges and writes everything; returns the exit status."""
    people, base = subjects(options), pipeline.load(options.model)
    split, judge = "validation" if options.sweep else "heldout", None if options.images else judges.load()
    chosen = {name: way for name, way in ways.POCKET.items() if not options.only or name in options.only}
    table, columns = {}, {}
    if options.sweep:
        chosen = {f"{options.sweep} {more}": ways.POCKET[options.sweep] for more in options.more or [""]}
    for name, way in {BASE: None, **chosen}.items():
        more = tuple(name.removeprefix(options.sweep).split()) if options.sweep and way else ()
        rows, tuner = [], way and Tuner(way, options, more)
        for subject in people:
            made, found = made_of(subject, name, way, options, tuner, base)
            if judge is not None:
                found |= judged(judge, subject, made, split)
            if "image_encoder" in base.parts:
                found["clip-i"] = seen_alike(base, subject, made)
            rows.append(found)
            columns.setdefault(subject.number, {})[name] = made
        table[name] = summary(rows)
        print(f"{name}: {table[name]}", flush=True)
    for subject in people:
        figure(columns[subject.number], subject, options).save(options.out / f"grid-{subject.number}.png")
    print(written(table, options.out / "table") + f"look at {options.out / 'grid-0.png'}")
    return 0


def main() -> int:
    """Reads the command line and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a model; E4T needs an e4t/ folder in it")
    parser.add_argument("--images", help="a folder of pictures of one subject; default: drawn people, held out")
    parser.add_argument("--domain", default="face", help="what the pictures show")
    parser.add_argument("--full", action="store_true", help="6 people, 8 prompts, 2 seeds")
    parser.add_argument("--people", type=int, help="how many drawn people; default 2")
    parser.add_argument("--only", nargs="+", choices=ways.POCKET, help="some ways alone")
    parser.add_argument("--sweep", choices=ways.POCKET, help="one way with other settings, on people of other seeds")
    parser.add_argument("--with", dest="more", action="append", help="of a sweep: settings, such as 'steps=50'")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"), help="folder")
    options = parser.parse_args()
    options.prompts, options.seeds = (8, 2) if options.full else (4, 1)
    options.people = options.people or (6 if options.full else 2)
    compile_cache.keep()
    options.out.mkdir(parents=True, exist_ok=True)
    return compare(options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
