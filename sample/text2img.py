"""Makes pictures from words.

python sample/text2img.py --model pocket --prompt "a photo of a face on the beach" --seed 1 --batch 4
"""

import argparse
import sys
import time
from pathlib import Path

from PIL import Image


def parser():
    """Returns the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--model", default="pocket", help="pocket, a diffusers folder, a hub id, or random:sd15 and the like")
    add("--prompt", required=True, nargs="+", help="one prompt, or several")
    add("--negative-prompt", default="", help="what the pictures should not show")
    add(
        "--image", help="a picture of the subject, for a model with an E4T encoder; the prompt names it by its word, *s"
    )
    add("--seed", type=int, default=0, help="of the first picture; the others count on")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--sampler", default="ddim", help="ddim, euler, dpmpp_2m, ...")
    add("--schedule", default="normal", help="normal, karras, automatic, ...")
    add("--guidance", type=float, default=7.5, help="how strongly the prompt rules; 1 for none")
    add("--size", type=int, help="pixels; default: the model's")
    add("--batch", type=int, default=1, help="pictures per prompt")
    add("--clip-skip", type=int, default=0, help="last layers of the text encoder left out")
    add("--dtype", default="float32", help="float32, bfloat16, float16")
    add("--out", default="outputs/text2img", help="folder")
    return made


def main(arguments=None):
    """Makes the pictures; returns the exit status."""
    options = parser().parse_args(arguments)
    begin = time.monotonic()
    try:
        paths = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"{len(paths)} pictures in {time.monotonic() - begin:.1f} s: {paths[0].parent}")
    return 0


def run(options):
    """Writes the pictures that the options ask for and returns their paths."""
    from sdjax import compiled, generate
    from sdjax.convert import e4t, pipeline
    from sdjax.data import images

    compiled.keep()
    sd = pipeline.load(options.model, options.dtype)
    if options.image:
        size = generate.latent_shape(sd)[0] * sd.factor
        picture = images.square(images.decode(images.find(options.image)[0], size)[0], size)
        sd = e4t.personalise(sd, pipeline.locate(options.model), picture)
    prompts = [prompt for prompt in options.prompt for _ in range(options.batch)]
    pictures = generate.text2img(
        sd, prompts, seeds=range(options.seed, options.seed + len(prompts)), steps=options.steps,
        guidance=options.guidance, sampler=options.sampler, schedule=options.schedule,
        negative=options.negative_prompt, size=options.size, skip=options.clip_skip, progress=True,
    )  # fmt: skip
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{i:05d}-{options.seed + i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    return paths


if __name__ == "__main__":
    sys.exit(main())
