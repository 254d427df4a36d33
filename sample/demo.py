"""One image in, pictures of its subject out: the embedded model, personalised in seconds.

    make demo                                    # somebody whom the model has never seen
    python sample/demo.py --image photo.png      # a picture of your own

Rows of the grid: the model without the image, E4T's encoder alone, and after tuning.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import options as common
from PIL import Image

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
RECIPES = Path(__file__).parents[1] / "configs"
SEED = 10_000_003  # an identity that was held out from training
SCALE = 2  # the grid's pictures are shown at twice their size


def parser():
    """Returns the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", default="pocket", help="a model with an e4t/ folder")
    made.add_argument("--image", help="one picture; default: a drawn face that the model has never seen")
    made.add_argument("--steps", type=int, default=10, help="tuning steps; more: more of the person, less of a prompt")
    made.add_argument("--seed", type=int, default=0, help="of the pictures")
    common.output_options(made, "demo")
    return made


def main(arguments=None):
    """Runs the demo; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        result = run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"\nlook at {result}")
    return 0


def run(options):
    """Personalises the model, writes grid.png and timings.json, and returns the grid's path."""
    clock = _Clock()
    from sdjax import settings
    from sdjax.formats import pipeline
    from sdjax.formats.adapters import e4t
    from sdjax.images import grid, reading
    from sdjax.runtime import compile_cache
    from sdjax.sampling import generate
    from sdjax.service import provenance, records
    from sdjax.training.loop import train
    from sdjax.training.run import fresh

    compile_cache.keep(steps=options.steps)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    path = options.image or _stranger(out / "input.png")
    clock.lap("start")
    base = pipeline.load(options.model)
    size = generate.latent_shape(base)[0] * base.factor
    picture = reading.subject(path, size)
    seen = e4t.personalise(base, pipeline.locate(options.model), picture)
    clock.lap("load")
    recipe = RECIPES / ("pocket/tune.py" if options.model == "pocket" else "e4t_tune.py")
    wanted = [f"model={options.model}", f"init={options.model}", f"data.path={path}", f"steps={options.steps}"]
    tuned = train(settings.load(recipe, wanted), fresh(out / "run"))
    clock.lap("tuning, compilation included")

    def pictures(sd, word):
        prompts = [prompt.format(word) for prompt in PROMPTS]
        return generate.text2img(sd, prompts, seeds=[options.seed] * len(prompts), progress=True)

    after = pictures(tuned, "*s")
    clock.lap("first pictures, compilation included")
    again = pictures(tuned, "*s")
    clock.lap(f"{len(again)} pictures once more")
    rows = [("without", pictures(base, "a face")), ("encoder", pictures(seen, "*s")), (f"{options.steps} steps", after)]
    pages = [[picture if row == 0 else None, *made] for row, (_, made) in enumerate(rows)]
    heads = ["input", *(prompt.format("*s") for prompt in PROMPTS)]
    Image.fromarray(grid.sheet(pages, [name for name, _ in rows], heads, SCALE)).save(out / "grid.png")
    job = generate.Job([prompt.format("*s") for prompt in PROMPTS], seeds=[options.seed] * len(PROMPTS))
    about = {**provenance.of(tuned, options.model), "more": {"Task": "demo", "Image": Path(path).name}}
    for i, (prompt, made) in enumerate(zip(PROMPTS, after, strict=True)):
        record = records.of(job, i, made.shape[:2], **about)
        path = out / f"{prompt.format('s').replace(' ', '-')}.{options.format}"
        records.save(path, made, record, private=not options.public)
    (out / "timings.json").write_text(json.dumps(clock.laps, indent=1))
    return out / "grid.png"


def _stranger(path):
    from sdjax.data import pocketland

    place = pocketland.scene(SEED, context="room", style="photo", accessory="none")
    Image.fromarray(pocketland.draw(pocketland.identity(SEED), place)).save(path)
    return path


class _Clock:
    """Prints and keeps how long each part took."""

    def __init__(self):
        self.laps, self.last = {}, time.monotonic()

    def lap(self, name):
        now = time.monotonic()
        self.laps[name], self.last = round(now - self.last, 2), now
        print(f"{self.laps[name]:7.1f} s  {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
