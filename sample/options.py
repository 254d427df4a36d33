"""What the programs of this folder have in common: options, loading, errors in one line, and pictures written."""

import argparse
import sys
import time
from pathlib import Path

from PIL import Image


def parser(doc, name, guidance=7.5, steps=20):
    """Returns a command line's parser with the options that all tasks share; doc: the program's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--model", default="pocket", help="pocket, a diffusers folder, a single file, a hub id, or random:sd15 ...")
    add("--prompt", required=True, nargs="+", help="one prompt, or several")
    add("--negative-prompt", default="", help="what the pictures should not show")
    add("--seed", type=int, default=0, help="of the first picture; the others count on")
    add("--steps", type=int, default=steps, help="denoising steps")
    add("--sampler", default="ddim", help="ddim, euler, dpmpp_2m, ...")
    add("--schedule", default="normal", help="normal, karras, automatic, ...")
    add("--guidance", type=float, default=guidance, help="how strongly the prompt rules; 1 for none")
    add("--size", type=size, help="pixels, 512 or WIDTHxHEIGHT; default: the model's, or the given picture's")
    add("--batch", type=int, default=1, help="pictures per prompt")
    add("--clip-skip", type=int, default=0, help="last layers of the text encoder left out")
    add("--eta", type=float, help="fresh noise, 0 to 1, of samplers that take it")
    add("--variation-seed", type=int, default=0, help="another seed, of which the pictures get a part")
    add("--variation", type=float, default=0.0, help="that part, 0 to 1")
    add(
        "--adapter", nargs="+", action="extend", default=[], metavar="FILE[:STRENGTH]",
        help="LoRA, embeddings or hypernetworks, one or several",
    )  # fmt: skip
    add("--grammar", default="plain", help="what brackets in prompts mean: plain (nothing), a1111, comfyui")
    add("--noise-source", default="jax", help="whose numbers a seed stands for: jax, torch-cpu, philox")
    add("--dtype", default="float32", help="float32, bfloat16, float16")
    add("--out", default=f"outputs/{name}", help="folder")
    return made


def picture_options(made, resize=True):
    """Adds the options of tasks that begin with a picture."""
    made.add_argument("--image", required=True, help="the picture to begin with")
    if resize:
        made.add_argument("--resize", default="crop", help="how it gets to --size: crop, fill, stretch")


def size(text):
    """Returns 512, or (height, width) of "WIDTHxHEIGHT"."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0] if len(sides) == 1 else tuple(reversed(sides))


def main(made, run, arguments=None):
    """Parses the command line, makes pictures by run(options) -> paths, and returns the exit status."""
    options = made.parse_args(arguments)
    begin = time.monotonic()
    try:
        paths = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"{len(paths)} pictures in {time.monotonic() - begin:.1f} s: {paths[0].parent}")
    return 0


def load(options, change=lambda sd: sd):
    """Returns the model that the options name, changed, then with adapters; compiled programs are kept on disk."""
    from sdjax import compiled
    from sdjax.convert import adapters, pipeline

    compiled.keep()
    return adapters.attach_all(change(pipeline.load(options.model, options.dtype)), options.adapter)


def prompts(options):
    """Returns the prompts, each as often as pictures of it are wanted."""
    return [prompt for prompt in options.prompt for _ in range(options.batch)]


def settings(options):
    """Returns the settings of generate.Job that the options name, as a dict."""
    return dict(
        seeds=range(options.seed, options.seed + len(prompts(options))),
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        schedule=options.schedule,
        negative=options.negative_prompt,
        eta=options.eta,
        skip=options.clip_skip,
        grammar=options.grammar,
        noise_source=options.noise_source,
        variation=(options.variation_seed, options.variation),
        progress=True,
    )


def picture(path):
    """Returns an image file's pixels, uint8 [H W 3], upright and over white."""
    import numpy as np

    from sdjax.data import images

    (item,) = images.find(path)
    return np.asarray(images.decode(item, images.MAX_PIXELS)[0])


def write(pictures, options):
    """Writes the pictures into the folder that the options name; returns their paths."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{i:05d}-{options.seed + i}.png" for i in range(len(pictures))]
    for path, made in zip(paths, pictures, strict=True):
        Image.fromarray(made).save(path)
    return paths
