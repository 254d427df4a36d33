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
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import judges
import pocket
import ways
from tuning import Tuner

from sdjax import settings
from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.formats.storage import files
from sdjax.images import grid, reading
from sdjax.methods import clip
from sdjax.runtime import compile_cache
from sdjax.sampling import generate
from sdjax.stable_diffusion import to_pixels

PEOPLE, VIEWS = 50_000, 5  # offset of the people's seeds within a split; pictures of each
BASE = "base model"
KINDS = ("context", "style", "accessory")


@dataclass(frozen=True)
class Subject:
    """One subject: the folder of its pictures, and who it is where it is drawn."""

    folder: Path
    who: pocketland.Face | None = None
    number: int = 0


def subjects(options: argparse.Namespace) -> list[Subject]:
    """Returns the subjects: drawn people of a split, five pictures each, or the folder that was given."""
    if options.images:
        return [Subject(Path(options.images))]
    found, split = [], options.split
    for number in range(options.people):
        who, folder = pocketland.identity(pocket.SPLITS[split] + PEOPLE + number), options.out / split / f"{number}"
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


def judged(judge, subject: Subject, made: np.ndarray, options: argparse.Namespace) -> dict[str, float]:
    """Returns identity's three similarities and the share of what prompts name, of a person's pictures."""
    places = [*pocket.PLACES[: options.prompts]] * options.seeds
    scenes = [pocketland.scene(pocket.SCENES + 20_000 + 8 * subject.number + k, *p) for k, p in enumerate(places)]
    other = pocketland.identity(pocket.SPLITS[options.split] + 60_000 + subject.number)
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


def made_of(subject: Subject, name: str, way: ways.Way | None, more: tuple[str, ...], options, tuner, base) -> dict:
    """Returns {label: (pictures, figures)} of one subject in one way: what is kept, where it is all, else made now.

    A label is the way's name, and with options.marks also the number of steps.
    """
    told = {} if way is None else settings.to_json(way.settings(options.model, "", more))
    told |= {"prompts": options.prompts, "seeds": options.seeds}
    ends = {f"{name} @ {steps}": steps for steps in options.marks} if options.marks and way else {name: -1}
    folder = options.out / options.split / "made"
    paths = {label: folder / f"{subject.number}-{label.replace(' ', '_').replace('/', '_')}.npz" for label in ends}
    found = {label: held(path, told) for label, path in paths.items()}
    if all(found.values()):
        return found
    word = f"a {options.domain}" if way is None else way.word
    stages = [(-1, base, {"steps": 0})] if way is None else tuner.stages(source(subject, way), options.marks)
    for steps, sd, figures in stages:
        for label in [label for label, end in ends.items() if end in (-1, steps)]:
            made = pictures(sd, word, subject.number, options)
            found[label] = made, figures
            folder.mkdir(parents=True, exist_ok=True)
            with files.new_file(paths[label]) as temporary, open(temporary, "wb") as out:
                np.savez_compressed(out, pictures=made, figures=json.dumps(figures), told=json.dumps(told))
    return found


def held(path: Path, told: dict) -> tuple[np.ndarray, dict] | None:
    """Returns (pictures, figures) of a file that holds what is made by these settings; None where there is none."""
    if not path.is_file():
        return None
    with np.load(path) as file:
        same = json.loads(str(file["told"])) == json.loads(json.dumps(told))
        return (file["pictures"], json.loads(str(file["figures"]))) if same else None


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
        for name in ("seconds", "processor"):
            table[name] = round(float(np.median([row[name] for row in rows])), 1)
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


def measured(options: argparse.Namespace, people: list[Subject]) -> tuple[dict[str, list[dict]], dict[int, dict]]:
    """Returns ({label: figures of each person}, {person's number: {label: pictures}})."""
    base, judge = pipeline.load(options.model), None if options.images else judges.load()
    rows: dict[str, list[dict]] = {}
    columns: dict[int, dict] = {}
    for name, way, more in asked(options):
        tuner = way and Tuner(functools.partial(way.settings, more=more), options.model)
        for subject in people:
            for label, (made, figures) in made_of(subject, name, way, more, options, tuner, base).items():
                found = dict(figures)
                if judge is not None:
                    found |= judged(judge, subject, made, options)
                if "image_encoder" in base.parts:
                    found["clip-i"] = seen_alike(base, subject, made)
                rows.setdefault(label, []).append(found)
                columns.setdefault(subject.number, {})[label] = made
        for label in [label for label in rows if label.split(" @ ")[0] == name]:
            print(f"{label}: {summary(rows[label])}", flush=True)
    return rows, columns


def asked(options: argparse.Namespace) -> list[tuple[str, ways.Way | None, tuple[str, ...]]]:
    """Returns (name, way, further settings) of everything to compare, the base model first."""
    chosen = [(name, way, ()) for name, way in ways.POCKET.items() if not options.only or name in options.only]
    if options.sweep:
        mores = options.more or [""]
        chosen = [
            (f"{options.sweep} {more}".strip(), ways.POCKET[options.sweep], tuple(more.split())) for more in mores
        ]
    return [(BASE, None, ()), *chosen]


def compare(options: argparse.Namespace) -> int:
    """Makes, judges and writes everything; returns the exit status."""
    people = subjects(options)
    rows, columns = measured(options, people)
    table = {label: summary(found) for label, found in rows.items()}
    place = options.out / options.split
    for subject in people:
        figure(columns[subject.number], subject, options).save(place / f"grid-{subject.number}.png")
    (place / "people.json").write_text(json.dumps(rows, indent=1))
    print(written(table, place / "table") + f"look at {place / 'grid-0.png'}")
    return 0


def main() -> int:
    """Reads the command line and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a model; E4T needs an e4t/ folder in it")
    parser.add_argument("--images", help="a folder of pictures of one subject; default: drawn people, held out")
    parser.add_argument("--domain", default="face", help="what the pictures show")
    parser.add_argument("--full", action="store_true", help="8 people, 8 prompts, 2 seeds")
    parser.add_argument("--people", type=int, help="how many drawn people; default 2")
    parser.add_argument("--seeds", type=int, help="pictures of each prompt")
    parser.add_argument("--only", nargs="+", choices=ways.POCKET, help="some ways alone")
    parser.add_argument("--sweep", choices=ways.POCKET, help="one way with other settings, on people of other seeds")
    parser.add_argument("--with", dest="more", action="append", help="of a sweep: settings, such as 'steps=50'")
    parser.add_argument("--marks", type=int, nargs="+", default=(), help="also judge after so many steps of each run")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"), help="folder")
    options = parser.parse_args()
    options.prompts, people, seeds = (8, 8, 2) if options.full else (4, 2, 1)
    options.people, options.seeds = options.people or people, options.seeds or seeds
    options.split = "own" if options.images else "validation" if options.sweep else "heldout"
    compile_cache.keep()
    options.out.mkdir(parents=True, exist_ok=True)
    return compare(options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
