"""Compares all ways to personalise a model on the same people, prompts and seeds; writes one figure and one table.

    make compare                                         2 drawn people, 4 prompts
    make compare ARGS=--full                             8 people, 8 prompts, 2 seeds, with 95 % intervals
    make compare ARGS="--images photos/cat --domain cat" pictures of your own: no judges of looks
    python benchmarks/compare.py --sweep "LoRA, 5" --with "steps=50 optim.lr=1e-3" --with "steps=100 optim.lr=3e-4"

    make compare MODEL=FOLDER ARGS="--images photos/cat --domain cat --init E4T --judge openai/clip-vit-base-patch32"

The people are held out: neither the model nor any choice of steps and rates has seen them; --sweep takes others.
Writes OUT/SPLIT/grid-PERSON.png (a row for each prompt, a column for each way), table.md, table.json and people.json.
--sweep also adds its rows to sweeps.json, which collects all sweeps (pocket's are in docs/sweeps.json).
OUT/SPLIT/made/ keeps the pictures of each person and way; a rerun makes the missing ones.

Identity is 1 for another drawing of the person and 0 for somebody else; prompts is the share of places, styles and
accessories that the pictures show.  Seconds cover preparation and steps; compilation has its own column.  "processor"
is the processor seconds of the same work.  Memory is the compiler's figure for one step.  CLIP-I and CLIP-T are the
cosines of the judge, by default the model's own CLIP.

The table is written after each way.  A way that cannot run is left out with a line, such as E4T for a model without
its encoder.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import judges
import pocket
import subjects
import ways
from measures import by_clip, looks
from published import added, published
from subjects import Subject
from tuning import Tuner

from sdjax import settings
from sdjax.formats import judge, pipeline
from sdjax.formats.storage import files
from sdjax.images import grid
from sdjax.runtime import accelerator, compile_cache, room
from sdjax.sampling import generate
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

BASE, E4T = "base model", "E4T, 1"
AT_ONCE = 16  # pictures of a batch
SIDE = 256  # most pixels of a picture in the figure
OUT_OF_MEMORY = "out of memory; --with 'compute=bfloat16 frozen=bfloat16 remat=True' needs less"


# ---- making --------------------------------------------------------------------------------------


def subjects_of(options: argparse.Namespace) -> list[Subject]:
    """Returns the subjects that the options ask for."""
    if options.protocol:
        return subjects.protocol(options.protocol)
    if options.images:
        return subjects.own(options.images, options.domain)
    return subjects.drawn(options.out, options.split, options.people)


def asked(options: argparse.Namespace) -> list[tuple[str, str, tuple[str, ...]]]:
    """Returns (label, way, further settings) of each row to compare, the base model first."""
    if options.sweep:
        chosen = [
            (f"{options.sweep} {more}".strip(), options.sweep, tuple(more.split())) for more in options.more or [""]
        ]
    else:
        more = tuple(setting for given in options.more or () for setting in given.split())
        chosen = [(name, name, more) for name in ways.POCKET if not options.only or name in options.only]
    return [(BASE, "", ()), *chosen]


def pictures(sd: StableDiffusion, word: str, subject: Subject, options: argparse.Namespace) -> np.ndarray:
    """Returns a word's pictures uint8 [seeds * prompts H W 3], all prompts of a seed together."""
    texts = subject.texts(word, options.prompts) * options.seeds
    each = len(texts) // options.seeds
    seeds = [1000 * subject.number + k // each for k in range(len(texts))]
    how = pocket.SAMPLING if options.model == "pocket" else {}
    parts = [slice(k, k + AT_ONCE) for k in range(0, len(texts), AT_ONCE)]
    return np.concatenate([generate.text2img(sd, texts[part], seeds=seeds[part], **how) for part in parts])


def made_of(
    subject: Subject, label: str, way: ways.Way | None, tuner: Tuner | None, base: StableDiffusion, options
) -> dict[str, tuple[np.ndarray, dict]]:
    """Returns {label: (pictures, figures)} of one subject in one way; makes them all unless all are kept.

    With options.marks, labels include the number of steps.
    """
    run = None if tuner is None else tuner.told(options.model, "")
    told = {} if run is None else settings.to_json(run)
    photos = [hashlib.sha256(path.read_bytes()).hexdigest() for path in subject.files]
    told |= {"prompts": options.prompts, "seeds": options.seeds, "model": options.model, "photos": photos}
    ends = {label: -1}
    if options.marks and run:
        ends = {f"{label} @ {steps}": steps for steps in options.marks if steps <= run.steps}
    folder = options.out / options.split / "made"
    paths = {end: folder / f"{subject.number}-{end.replace(' ', '_').replace('/', '_')}.npz" for end in ends}
    found = {end: held(path, told) for end, path in paths.items()}
    if all(found.values()):
        return found
    word = subject.plain if way is None else way.word
    stages = tuner.stages(subject.source(way.pictures), options.marks) if tuner else [(-1, base, {"steps": 0})]
    for steps, sd, figures in stages:
        for end in [end for end, last in ends.items() if last in (-1, steps)]:
            found[end] = pictures(sd, word, subject, options), figures
            folder.mkdir(parents=True, exist_ok=True)
            with files.new_file(paths[end]) as temporary, open(temporary, "wb") as out:
                np.savez_compressed(out, pictures=found[end][0], figures=json.dumps(figures), told=json.dumps(told))
    return found


def held(path: Path, told: dict) -> tuple[np.ndarray, dict] | None:
    """Returns a file's (pictures, figures) if they come from the settings `told`, otherwise None."""
    if not path.is_file():
        return None
    with np.load(path) as file:
        same = json.loads(str(file["told"])) == json.loads(json.dumps(told))
        return (file["pictures"], json.loads(str(file["figures"]))) if same else None


def holds_encoder(model: str) -> bool:
    """Returns whether a model holds E4T's encoder, as far as its name and folder tell."""
    return model == "pocket" or not (Path(model).exists() or ":" in model) or (Path(model) / "e4t").is_dir()


def tuned(
    options: argparse.Namespace, people: list[Subject], base: StableDiffusion, label: str, name: str, more: tuple
) -> Iterator[tuple[Subject, str, np.ndarray, dict]]:
    """Yields (subject, label, pictures, figures) of a row; it compiles one step per domain.

    name: the way, "" for the base model.  more: further settings.
    """
    if name == E4T and not options.init and not holds_encoder(options.model):
        raise SettingError("init", "", f"a folder with E4T's encoder: {options.model} has none")
    tuners: dict[str, tuple] = {}
    for subject in people:
        if name and subject.domain not in tuners:
            way = ways.of(options.model, subject.domain)[name]
            told = functools.partial(way.settings, more=more, init=options.init, vision=options.vision)
            tuners[subject.domain] = way, Tuner(told, options.model)
        way, tuner = tuners.get(subject.domain, (None, None))
        for end, (made, figures) in made_of(subject, label, way, tuner, base, options).items():
            yield subject, end, made, figures


# ---- judging -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Results:
    """What is known so far.

    rows: {label: figures of each person}.  columns: {person's number: {label: small pictures}}.  left: {label: why a
    way is left out}.
    """

    rows: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    columns: dict[int, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def table(self) -> dict[str, dict]:
        """The table's rows."""
        return {label: summary(found) for label, found in self.rows.items()}


def measured(options: argparse.Namespace, people: list[Subject]) -> Iterator[Results]:
    """Yields the results after each row; a way that raises ValueError is left out, with a line."""
    base = pipeline.load(options.model)
    clip, results = judge.load(options.judge) if options.judge else judge.of(base), Results()
    for label, name, more in asked(options):
        rows, columns = collections.defaultdict(list), collections.defaultdict(dict)
        try:
            with room.memory(OUT_OF_MEMORY):
                for subject, end, made, figures in tuned(options, people, base, label, name, more):
                    told = looks(judges.load(), subject, made, options) if subject.who else {}
                    rows[end].append({**figures, **told, **by_clip(clip, subject, made, options)})
                    columns[subject.number][end] = small(made[: options.prompts])
        except ValueError as error:
            if not name:
                raise
            results.left[label] = str(error)
            print(f"{label}: left out: {error}", flush=True)
            continue
        for end, found in rows.items():
            print(f"{end}: {summary(found)}", flush=True)
        results.rows |= rows
        for number, found in columns.items():
            results.columns.setdefault(number, {}).update(found)
        yield results


def small(pictures: np.ndarray) -> np.ndarray:
    """Returns pictures of the figure, at most SIDE pixels wide."""
    width = pictures.shape[2]
    if width <= SIDE:
        return pictures
    size = SIDE, round(pictures.shape[1] * SIDE / width)
    return np.stack([np.asarray(Image.fromarray(picture).resize(size)) for picture in pictures])


# ---- results -------------------------------------------------------------------------------------


def summary(rows: list[dict]) -> dict:
    """Returns a way's row of the table."""
    table: dict = {}
    if "s" in rows[0]:
        s, s0, s1 = (np.array([row[name] for row in rows]) for name in ("s", "s0", "s1"))
        scores = (s - s0.mean()) / (s1.mean() - s0.mean())
        for name, values in (("identity", scores), ("prompts", np.array([row["prompts"] for row in rows]))):
            table[name], table[f"{name}, 95 %"] = round(float(values.mean()), 3), pocket.interval(values)
    for name in ("clip-i", "clip-t"):
        if name in rows[0]:
            table[name.upper()] = round(float(np.mean([row[name] for row in rows])), 3)
    table["steps"] = rows[0]["steps"]
    if "seconds" in rows[0]:
        for name in ("seconds", "processor"):
            table[name] = round(float(np.median([row[name] for row in rows])), 1)
        table["compilation"] = round(max(row.get("compilation", 0) for row in rows), 1)
        table["MB of memory"] = round(rows[0]["memory"] / 1e6)
        table["kB to keep"] = round(rows[0]["bytes"] / 1e3)
    return table


def asked_for(options: argparse.Namespace) -> dict:
    """Returns the options that a table's figures depend on."""
    return {name: getattr(options, name) for name in ("people", "prompts", "seeds", "split")}


def documented(
    folder: Path, table: dict[str, dict], asked: dict, sheet: Image.Image
) -> tuple[dict, Image.Image | None]:
    """Returns (content of compare.json, the figure or None).

    The content has this run's rows, and the file's rows of other ways if its options are the same.  None: the figure
    lacks some ways.
    """
    path = folder / "compare.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    rows = (before["table"] if before.get("options") == asked else {}) | table
    order = [name for name in (BASE, *ways.POCKET) if name in rows]
    whole = set(ways.POCKET) <= set(table)
    return {"options": asked, "table": {name: rows[name] for name in order}}, sheet if whole else None


def written(results: Results, path: Path, options: argparse.Namespace) -> str:
    """Writes the table as JSON, with its options, and as Markdown; returns the Markdown."""
    table = results.table
    path.with_suffix(".json").write_text(json.dumps({"options": asked_for(options), "table": table}, indent=1) + "\n")
    heads = list(dict.fromkeys(head for row in table.values() for head in row if not head.endswith("95 %")))
    lines = ["| way | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(cell(row, head) for head in heads) + " |")
    lines += [f"\n{name}: left out: {why}" for name, why in results.left.items()]
    text = "\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(text)
    return text


def cell(row: dict, head: str) -> str:
    """Returns one figure of the table, with its interval if it has one."""
    low, high = row.get(f"{head}, 95 %", (None, None))
    return f"{row.get(head, '')}" if low is None else f"{row[head]} ({low:.2f} to {high:.2f})"


def figure(columns: dict[str, np.ndarray], subject: Subject, options: argparse.Namespace) -> Image.Image:
    """Returns the figure of one subject: a row for each prompt, a column for each way, the input first."""
    height, width = next(iter(columns.values())).shape[1:3]
    own = np.asarray(Image.open(subject.files[0]).convert("RGB").resize((width, height)))
    names = [text.replace("{}", "...") for text in subject.texts("{}", options.prompts)]
    if subject.who:
        names = [" ".join(word for word in place if word != "none") for place in pocket.PLACES[: options.prompts]]
    rows = [[own, *(made[k] for made in columns.values())] for k in range(len(names))]
    return Image.fromarray(grid.sheet(rows, names, ["input", *columns], scale=max(1, 128 // width)))


def shown(results: Results, people: list[Subject], options: argparse.Namespace) -> tuple[str, list[Image.Image]]:
    """Writes what is known so far; returns the table and each person's figure."""
    place = options.out / options.split
    place.mkdir(parents=True, exist_ok=True)
    sheets = [figure(results.columns[subject.number], subject, options) for subject in people]
    for subject, sheet in zip(people, sheets, strict=True):
        sheet.save(place / f"grid-{subject.number}.png")
    (place / "people.json").write_text(json.dumps(results.rows, indent=1))
    if options.sweep:
        rows = {label: {**row, "judged by": asked_for(options)} for label, row in results.table.items()}
        added(place / "sweeps.json", rows)
    return written(results, place / "table", options), sheets


def compare(options: argparse.Namespace) -> int:
    """Makes and judges the pictures and writes the results after each row; returns the exit status."""
    people = subjects_of(options)
    text, sheets, results = "", [], Results()
    for results in measured(options, people):
        text, sheets = shown(results, people, options)
    if results.left:
        text = written(results, options.out / options.split / "table", options)  # with the last way left out
    print(f"{text}look at {options.out / options.split / 'grid-0.png'}")
    if options.docs:
        published(options.docs, "compare", *documented(options.docs, results.table, asked_for(options), sheets[0]))
    return 0


def read(arguments: list[str]) -> argparse.Namespace:
    """Returns the options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a model")
    parser.add_argument("--init", default="", help="E4T's encoder; default: the model's own, in its folder e4t/")
    parser.add_argument("--vision", default="", help="an image encoder for E4T, if neither model nor --init has one")
    parser.add_argument(
        "--judge", default="", help="a folder or hub id of a CLIPModel for CLIP-I and CLIP-T; default: the model's own"
    )
    parser.add_argument("--images", help="a folder of pictures of one subject; default: drawn people, held out")
    parser.add_argument("--domain", default="face", help="what the pictures show")
    parser.add_argument("--protocol", help="the folder of DreamBooth's data set: its subjects, 25 prompts, 4 seeds")
    parser.add_argument("--full", action="store_true", help="8 people, 8 prompts, 2 seeds")
    parser.add_argument("--people", type=int, help="how many drawn people; default 2")
    parser.add_argument("--seeds", type=int, help="pictures of each prompt")
    parser.add_argument("--only", nargs="+", choices=ways.POCKET, help="only these ways")
    parser.add_argument("--sweep", choices=ways.POCKET, help="one way with other settings, on people of other seeds")
    parser.add_argument(
        "--with",
        dest="more",
        action="append",
        help="settings of every way, such as 'steps=50'; of a sweep, one row for each --with",
    )
    parser.add_argument(
        "--marks", type=int, nargs="+", default=(), help="numbers of steps to judge after, instead of the last step"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"), help="folder")
    parser.add_argument(
        "--docs", type=Path, help="also put the rows into compare.json and the first person into compare.webp here"
    )
    options = parser.parse_args(arguments)
    options.prompts, people, seeds = (25, 0, 4) if options.protocol else (8, 8, 2) if options.full else (4, 2, 1)
    options.people, options.seeds = options.people or people, options.seeds or seeds
    own = options.images or options.protocol
    options.split = "own" if own else "validation" if options.sweep else "heldout"
    return options


def main() -> int:
    """Reads the command line and compares; returns the exit status."""
    options = read(sys.argv[1:])
    accelerator.check()
    compile_cache.keep(steps=compile_cache.FEW)  # nine compiled steps; each runs a few hundred times
    return compare(options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the table has the finished ways; rerun the command to continue")
