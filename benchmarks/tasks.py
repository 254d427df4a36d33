"""Trains the embedded model to inpaint, to upscale and to decode one style, and measures it on held-out people.

    python benchmarks/tasks.py train inpainting upscaler vae      # outputs/tasks/NAME/export
    python benchmarks/tasks.py judge                              # NAME.json and NAME.png of the trained ones

inpainting   A UNet that reads mask and surroundings repaints the right half of a face; the base model gets the known
             half with noise instead.  Error in the hole (0 to 255), similarity to the person.
upscaler     From 16 to 64 pixels, against the untrained upscaler with the same words, and against bicubic.  PSNR, the
             judge's similarity.
vae          A decoder is trained on pictures of one style (`--style`).  PSNR of held-out pictures in that style and in
             the others.

Figures are means over pictures with 95 % intervals.  Make choices with --split validation.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import embedded
import judges
import pocket
from published import published

import sdjax.settings
from sdjax import tasks
from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.images import grid
from sdjax.runtime import compile_cache
from sdjax.sampling.inpainting import inpaint
from sdjax.sampling.upscaling import upscale
from sdjax.stable_diffusion import StableDiffusion, to_pictures, to_pixels
from sdjax.training.loop import train
from sdjax.training.settings import Train

CONFIGS = Path(__file__).parents[1] / "configs"
FIRST, SHOWN, PART = 90_000, 6, 16  # offset of the people's seeds in a split; pictures in a figure, and at once
SAMPLING = {"steps": 20, "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 2.0}
FACTOR = 4  # of pocket's autoencoder
TAUGHT = 2000  # pictures that the decoder learns from
MUON = ("optim.kind=muon", "optim.schedule=cosine", "optim.warmup=10", "optim.weight_decay=0.0", "data.batch=8")
RUNS = {  # recipe: steps and other settings that differ from the recipe's for SD 1.5
    "inpainting": (
        *MUON,
        "data.path=pocketland",
        "optim.lr=6e-4",
        'optim.rates=(("conv_in", 3.0),)',
        "data.batch=16",
        "min_snr=1.0",
        "ema=0.998",
        "steps=2400",
    ),  # fmt: skip
    "upscaler": (*MUON, "data.path=pocketland", "optim.lr=3e-3", "min_snr=1.0", "steps=400"),
    "vae": (*MUON, "optim.lr=3e-3", "steps=400", "ema=0.98", "data.crop=center", "optim.betas=(0.9, 0.99)"),
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """Held-out people in scenes: pictures uint8 [N S S 3], and captions."""

    pictures: np.ndarray
    words: list[str]


def people(options: argparse.Namespace, style: str | None = None) -> Seen:
    """Returns `count` people of a split in scenes of random styles, or of `style`."""
    first = pocket.SPLITS[options.split] + FIRST
    pairs = [
        (
            pocketland.identity(first + i, "face"),
            pocketland.scene(pocket.SCENES + FIRST + i, style=style, accessory="none"),
        )
        for i in range(options.count)
    ]
    pictures = np.stack([embedded.draw(*both) for both in pairs])
    return Seen(pictures, [pocketland.caption(*both, i) for i, both in enumerate(pairs)])


def settings(name: str, options: argparse.Namespace) -> Train:
    """Returns the settings of a run."""
    told = ["model=pocket", "checkpoint=0", "preview=0", *RUNS[name], *options.overrides]
    if name == "vae":
        told.append(f"data.path={taught(options)}")
    return sdjax.settings.load(CONFIGS / f"{name}.py", told)


def taught(options: argparse.Namespace) -> Path:
    """Returns a folder with pictures of training people in options.style; draws the missing ones."""
    folder = options.out / f"taught-{options.style}"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(list(folder.glob("*.png"))), TAUGHT):
        who, place = pocketland.identity(i, "face"), pocketland.scene(i, style=options.style)
        Image.fromarray(embedded.draw(who, place)).save(folder / f"{i}.png")
    return folder


# ---- judging -------------------------------------------------------------------------------------


def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the judge's similarity of each pair of pictures [N]."""
    judge = judges.load()
    return (judges.identity(judge, one) * judges.identity(judge, other)).sum(-1)


def psnr(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns 10 log10(255^2 / mse) of each pair of pictures [N], in dB."""
    error = np.mean((one.astype(float) - other) ** 2, axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-3))


def figure(values: np.ndarray) -> dict:
    """Returns {"mean", "interval"} of values [N]."""
    return {"mean": round(float(np.mean(values)), 4), "interval": pocket.interval(values)}


def parted(make, seen: Seen, *more: np.ndarray) -> np.ndarray:
    """Returns make(words, seeds, *arrays) for all people, computed for PART at a time."""
    parts = [slice(i, i + PART) for i in range(0, len(seen.words), PART)]
    return np.concatenate(
        [make(seen.words[p], range(p.start, p.start + len(seen.words[p])), *(x[p] for x in more)) for p in parts]
    )


def inpainting(model: StableDiffusion, options: argparse.Namespace) -> tuple[dict, dict]:
    """Returns (figures, rows of pictures): the right half of each picture repainted."""
    seen = people(options)
    masks = np.zeros(seen.pictures.shape[:3], np.uint8)
    half = embedded.SIDE // 2
    masks[:, :, half:] = 255
    hidden = np.where(masks[..., None] > 0, 127, seen.pictures).astype(np.uint8)
    rows, table = {"the picture": seen.pictures, "what is known": hidden}, {}
    for name, sd in (("base model", pipeline.load("pocket")), ("inpainting", model)):
        made = parted(
            lambda words, seeds, p, m, sd=sd: inpaint(sd, words, p, m, seeds=seeds, **SAMPLING),
            seen,
            seen.pictures,
            masks,
        )
        error = np.abs(made[:, :, half:].astype(float) - seen.pictures[:, :, half:]).mean((1, 2, 3))
        table[name] = {"error in the hole": figure(error), "similarity": figure(alike(made, seen.pictures))}
        rows[name] = made
    return table, rows


def upscaler(model: StableDiffusion, options: argparse.Namespace) -> tuple[dict, dict]:
    """Returns (figures, rows of pictures): pictures of 16 pixels enlarged four times."""
    seen = people(options)
    n, side, _, _ = seen.pictures.shape
    tiles = seen.pictures.reshape(n, side // FACTOR, FACTOR, side // FACTOR, FACTOR, 3)
    small = tiles.mean((2, 4)).round().astype(np.uint8)

    def enlarged(filter):
        return np.stack([np.asarray(Image.fromarray(one).resize((side, side), filter)) for one in small])

    rows = {
        "the picture": seen.pictures,
        "16 pixels": enlarged(Image.Resampling.NEAREST),
        "bicubic": enlarged(Image.Resampling.BICUBIC),
    }
    base = tasks.of(model, "upscaling").prepare(pipeline.load("pocket"), jax.random.key(0))
    for name, sd in (("base model", base), ("upscaler", model)):
        rows[name] = parted(lambda words, seeds, p, sd=sd: upscale(sd, words, p, seeds=seeds, **SAMPLING), seen, small)
    judged = {name: rows[name] for name in ("bicubic", "base model", "upscaler")}
    return {
        name: {"psnr": figure(psnr(made, seen.pictures)), "similarity": figure(alike(made, seen.pictures))}
        for name, made in judged.items()
    }, rows  # fmt: skip


def vae(model: StableDiffusion, options: argparse.Namespace) -> tuple[dict, dict]:
    """Returns (figures, rows of pictures): pictures encoded and decoded, in the taught style and the others."""
    again, base = jax.jit(lambda sd, x: sd.decode(sd.encode(x))), pipeline.load("pocket")
    table, rows = {}, {}
    for style in (options.style, *(other for other in pocketland.STYLES if other != options.style)):
        seen = people(options, style)
        for name, sd in (("base model", base), ("decoder", model)):
            made = parted(lambda words, seeds, p, sd=sd: to_pictures(again(sd, to_pixels(p))), seen, seen.pictures)
            table.setdefault(name, {})[style] = figure(psnr(made, seen.pictures))
            if style == options.style:
                rows |= {"the picture": seen.pictures, name: made}
    return table, rows


def main() -> None:
    """Trains or judges the named tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "judge"))
    parser.add_argument("names", nargs="*", help=", ".join(RUNS))
    parser.add_argument("--split", choices=pocket.SPLITS, default="heldout", help="split of the people")
    parser.add_argument("--count", type=int, default=128, help="number of people to judge")
    parser.add_argument("--style", choices=pocketland.STYLES, default="mosaic", help="style to train the decoder on")
    parser.add_argument("--with", dest="overrides", nargs="*", default=(), help="settings of the runs, like steps=100")
    parser.add_argument("--out", type=Path, default=Path("outputs/tasks"))
    parser.add_argument("--docs", type=Path, help="judge: also write NAME.json and NAME.webp here")
    options = parser.parse_args()
    compile_cache.keep()
    there = [name for name in RUNS if options.what == "train" or (options.out / name / "export").is_dir()]
    for name in options.names or there:
        if options.what == "train":
            begin, used = time.monotonic(), time.process_time()
            train(settings(name, options), options.out / name)
            print(f"{name}: {time.monotonic() - begin:.0f} s, {time.process_time() - used:.0f} s of CPU", flush=True)
            continue
        judge = {"inpainting": inpainting, "upscaler": upscaler, "vae": vae}[name]
        table, rows = judge(pipeline.load(str(options.out / name / "export")), options)
        told = table | {"split": options.split, "count": options.count}
        (options.out / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
        sheet = grid.sheet([list(made[:SHOWN]) for made in rows.values()], rows, scale=2)
        Image.fromarray(sheet).save(options.out / f"{name}.png")
        published(options.docs, name, told, sheet)
        print(name, json.dumps(table, indent=1), flush=True)


if __name__ == "__main__":
    main()
