"""Personalizes a model from one image in seconds and draws a sheet of pictures of its subject.

The rows of the grid: the model without the image, with E4T's encoder alone, and after tuning.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdjax.service import flags, programs

PROMPTS = (
    "a photo of {} on the beach",
    "a pencil sketch of {} in the forest",
    "a watercolor painting of {} in the snow",
    "a neon sign of {} in the city at night",
    "a mosaic of {} in the meadow wearing a hat",
    "a comic of {} in space",
    "a photo of {} in the desert wearing glasses",
    "a photo of {} in a room with a scarf",
)
SEED = 10_000_003  # an identity held out from training
SMALL = 160  # text width of the embedded model and of `make pocket`'s
SHOWN = 128  # least side of a picture in the grid, in pixels


def parser(prog: str) -> flags.Parser:
    """Returns the command line's parser.  prog: the program's name in its help."""
    made = flags.Parser(__doc__, prog=prog)
    made.add_argument("--model", default="pocket", help="a model with an e4t/ folder; default: pocket")
    made.add_argument("--image", help="the input picture; default: a drawn face that the model has never seen")
    made.add_argument(
        "--steps",
        type=int,
        default=10,
        help="tuning steps; more steps show more of the person and less of the prompt; default: 10",
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the pictures")
    programs.add_places(made.add_argument, "demo")
    return made


def main(arguments: Sequence[str], prog: str = "sdjax demo") -> int:
    """Runs the demo; returns the exit status.  prog: the program's name in its help."""
    options = parser(prog).parse_args(arguments)
    try:
        with programs.one_line():
            result = run(options)
    except SystemExit as end:
        return end.code  # pyright: ignore[reportReturnType]  # one_line ends with a number
    print(f"\nlook at {result}")
    return 0


def run(options: Any) -> Path:
    """Personalises the model, writes grid.png and timings.json, and returns the grid's path."""
    clock = _Clock()
    from sdjax import settings
    from sdjax.formats import pipeline
    from sdjax.formats.adapters import e4t
    from sdjax.images import reading
    from sdjax.runtime import accelerator, compile_cache
    from sdjax.sampling.latents import latent_shape
    from sdjax.training import recipes
    from sdjax.training.loop import train
    from sdjax.training.run_folder import fresh

    compile_cache.keep(steps=options.steps)
    accelerator.check()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    clock.lap("start")
    base = pipeline.load(options.model)
    size = latent_shape(base)[0] * base.factor
    path = options.image or _stranger(out / "input.png", size)
    picture = reading.subject(path, size)
    seen = e4t.personalise(base, pipeline.locate(options.model), picture)
    clock.lap("load")
    small = base.networks["unet"].config.cross_attention_dim == SMALL
    recipe = recipes.find("pocket/tune" if small else "e4t_tune")
    wanted = [f"model={options.model}", f"init={options.model}", f"data.path={path}", f"steps={options.steps}"]
    tuned = train(settings.load(recipe, wanted), fresh(out / "run"))
    clock.lap("tuning, compilation included")
    after = _pictures(tuned, "*s", options.seed)
    clock.lap("first pictures, compilation included")
    again = _pictures(tuned, "*s", options.seed)
    clock.lap(f"{len(again)} pictures once more")
    rows = {"without": _pictures(base, "a face", options.seed), "encoder": _pictures(seen, "*s", options.seed)}
    _sheet(out / "grid.png", picture, rows | {f"{options.steps} steps": after})
    _written(out, tuned, after, path, options)
    (out / "timings.json").write_text(json.dumps(clock.laps, indent=1))
    return out / "grid.png"


def _pictures(sd, word, seed):
    from sdjax.sampling import generate

    prompts = [prompt.format(word) for prompt in PROMPTS]
    return generate.text2img(sd, prompts, seeds=[seed] * len(prompts), progress=True)


def _sheet(path, picture, rows):
    from PIL import Image

    from sdjax.images import grid

    pages = [[picture if row == 0 else None, *made] for row, made in enumerate(rows.values())]
    heads = ["input", *(prompt.format("*s") for prompt in PROMPTS)]
    Image.fromarray(grid.sheet(pages, list(rows), heads, max(1, SHOWN // len(picture)))).save(path)


def _written(out, sd, pictures, image, options):
    from sdjax.sampling.settings import TextToImage
    from sdjax.service import provenance, records

    for prompt, picture in zip(PROMPTS, pictures, strict=True):
        made = TextToImage(prompt=prompt.format("*s"), seed=options.seed, model=options.model, image=str(image))
        names, hashes = provenance.of(sd, made)
        record = records.of(made, picture.shape[:2], names, hashes=hashes, more={"Comment": "tuned by the demo"})
        path = out / f"{prompt.format('s').replace(' ', '-')}.{options.format}"
        records.save(path, picture, record, private=not options.public)


def _stranger(path, size):
    from PIL import Image

    from sdjax.data import pocketland

    place = pocketland.scene(SEED, context="room", style="photo", accessory="none")
    Image.fromarray(pocketland.draw(pocketland.identity(SEED), place, size)).save(path)
    return path


class _Clock:
    """Prints and keeps the time of each part."""

    def __init__(self):
        self.laps, self.last = {}, time.monotonic()

    def lap(self, name):
        now = time.monotonic()
        self.laps[name], self.last = round(now - self.last, 2), now
        print(f"{self.laps[name]:7.1f} s  {name}", flush=True)
