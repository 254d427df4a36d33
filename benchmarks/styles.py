"""Makes two figures on held-out people: the same subject in several styles, the same style with several subjects.

    python benchmarks/styles.py                # outputs/styles/{subject,style}.png and styles.json

subject   E4T on one picture each, in the six styles that the embedded model knows: identity, share of right styles.
style     A LoRA on eight captioned pictures in a style that the model does not know, a print of eight pure colours.
          Mean distance of values from these colours (0 to 255) in pictures of other subjects, by the LoRA with its word
          and by the base model.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import embedded
import judges
import pocket
import subjects
import ways
from published import published
from tuning import Tuner

from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.images import grid
from sdjax.runtime import compile_cache
from sdjax.sampling import generate

FIRST, TAUGHT, SHOWN = 95_000, 8, 16  # offset of people's seeds; training pictures of the style; subjects drawn in it
WORD = "sks"


def printed(picture: np.ndarray) -> np.ndarray:
    """Returns a picture [H W 3] in eight pure colours."""
    return np.where(picture >= 128, 255, 0).astype(np.uint8)


def impure(pictures: np.ndarray) -> np.ndarray:
    """Returns for each picture of [N H W 3] the mean distance of its values from 0 or 255, whichever is nearer."""
    values = pictures.astype(float)
    return np.minimum(values, 255 - values).mean((1, 2, 3))


def subject(options: argparse.Namespace) -> dict:
    """Writes subject.png; returns identity and the share of right styles."""
    tuner, judge = Tuner(ways.of("pocket", "face")["E4T, 1"].settings, "pocket"), judges.load()
    rows, scores, right = [], [], []
    others = pocket.SPLITS[options.split] + 60_000
    for one in subjects.drawn(options.out, options.split, options.people):
        sd, _ = tuner(one.source(1))
        texts = [pocketland.prompt({"style": style}, subject="*s") for style in pocketland.STYLES]
        made = generate.text2img(sd, texts, seeds=range(len(texts)), **pocket.SAMPLING)
        own = np.asarray(Image.open(one.files[0]))
        asked = judges.identity(judge, own[None])[0]
        scenes = [pocketland.scene(pocket.SCENES + i, style=style) for i, style in enumerate(pocketland.STYLES)]
        s, s1, s0 = (
            float((judges.identity(judge, np.stack(some)) @ asked).mean())
            for some in (
                made,
                [embedded.draw(one.who, scene) for scene in scenes],
                [embedded.draw(pocketland.identity(others + one.number), scene) for scene in scenes],
            )
        )
        scores.append((s, s0, s1))
        right.append(float(np.mean(judges.classify(judge, made)["style"] == np.array(pocketland.STYLES))))
        rows.append([own, *made])
    sheet = grid.sheet(rows[:4], columns=["input", *pocketland.STYLES], scale=2)
    Image.fromarray(sheet).save(options.out / "subject.png")
    s, s0, s1 = np.array(scores).T
    identity = (s - s0.mean()) / (s1.mean() - s0.mean())
    table = {
        "people": len(rows), "identity": round(float(identity.mean()), 3), "identity, 95 %": pocket.interval(identity),
        "styles": round(float(np.mean(right)), 3), "styles, 95 %": pocket.interval(right),
    }  # fmt: skip
    published(options.docs, "subject", table | {"split": options.split}, sheet)
    return table


def style(options: argparse.Namespace) -> dict:
    """Writes style.png; returns the distance from the print's colours and the share of right subjects and scenes."""
    folder, first = options.out / "taught", pocketland.TRAIN[0]
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for i in range(TAUGHT):
        who, place = pocketland.identity(first + 11 * i), pocketland.scene(first + 7 * i, style="photo")
        shown.append(printed(embedded.draw(who, place)))
        Image.fromarray(shown[-1]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(pocketland.caption(who, place, i))
    more = ("data.word=sks", "data.templates=trigger", *options.overrides)
    sd, _ = Tuner(functools.partial(ways.of("pocket", "face")["LoRA, 5"].settings, more=more), "pocket")(folder)
    start = pocket.SPLITS[options.split] + FIRST
    domains = ["face", "cat"] * (SHOWN // 2)
    people = [pocketland.identity(start + i, domain) for i, domain in enumerate(domains)]
    places = [pocketland.scene(pocket.SCENES + FIRST + i, style="photo") for i in range(SHOWN)]
    texts = [pocketland.caption(*both, i) for i, both in enumerate(zip(people, places, strict=True))]
    made = {
        "base model": generate.text2img(pipeline.load("pocket"), texts, seeds=range(SHOWN), **pocket.SAMPLING),
        "with the style": generate.text2img(
            sd, [f"{WORD}, {text}" for text in texts], seeds=range(SHOWN), **pocket.SAMPLING
        ),
    }
    sheet = grid.sheet([shown, *(list(some[:8]) for some in made.values())], ["taught", *made], scale=2)
    Image.fromarray(sheet).save(options.out / "style.png")
    table = {"taught": {"distance": round(float(impure(np.stack(shown)).mean()), 2)}}
    for name, some in made.items():
        seen, far = judges.classify(judges.load(), some), impure(some)
        right = [seen[k][i] == getattr(places[i], k) for i in range(SHOWN) for k in ("context", "accessory")]
        right += list(seen["domain"] == np.array(domains))
        table[name] = {
            "distance": round(float(far.mean()), 2), "distance, 95 %": pocket.interval(far),
            "subject and scene": round(float(np.mean(right)), 3),
        }  # fmt: skip
    published(options.docs, "style", table | {"split": options.split, "count": SHOWN}, sheet)
    return table


def main() -> None:
    """Makes both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="subject, style; default both")
    parser.add_argument("--split", choices=pocket.SPLITS, default="heldout", help="split of the people")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--with", dest="overrides", nargs="*", default=(), help="settings of the style's LoRA")
    parser.add_argument("--out", type=Path, default=Path("outputs/styles"))
    parser.add_argument("--docs", type=Path, help="also write subject and style, .json and .webp, here")
    options = parser.parse_args()
    compile_cache.keep(steps=compile_cache.FEW)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "styles.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    for name, make in (("subject", subject), ("style", style)):
        if not options.what or name in options.what:
            table[name] = make(options)
            path.write_text(json.dumps(table, indent=1) + "\n")
            print(name, json.dumps(table[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
