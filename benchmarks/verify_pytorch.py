"""Compares pictures of sdjax with diffusers' on a model that sdjax wrote, from the same noise and prompts.

    make verify-pytorch                                  the embedded model
    make verify-pytorch MODEL=outputs/cat/export         a run's export

Writes the model to OUT/model, runs StableDiffusionPipeline on it in float32 and prints the largest and the mean
difference of the pictures, 0 to 255, for each sampler and prompt.  The exit status is 1 if any difference is above 1.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sdjax.convert import main as convert
from sdjax.formats import pipeline
from sdjax.images import grid
from sdjax.runtime import compile_cache
from sdjax.sampling import generate
from sdjax.sampling.latents import latent_shape

PROMPTS = ("a photo of a {} on the beach", "a pencil sketch of a {} in the snow")
SAMPLERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}


def theirs(pipe, sampler, noise, options, prompts):
    """Returns diffusers' pictures uint8 [B H W 3] from our noise [B h w c]."""
    import diffusers

    pipe.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(pipe.scheduler.config)
    made = pipe(
        prompts,
        negative_prompt=[""] * len(prompts),
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
    )
    return np.round(made.images * 255).astype(np.uint8)


def main():
    """Prints the differences and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="what sdjax.load takes")
    parser.add_argument("--out", type=Path, default=Path("outputs/verify-pytorch"), help="folder")
    parser.add_argument("--subject", default="face", help="the word that the prompts name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    options = parser.parse_args()
    from diffusers import StableDiffusionPipeline

    compile_cache.keep()
    folder = options.out / "model"
    if convert([options.model, str(folder), "--dtype", "float32"]):
        return 1
    sd = pipeline.load(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt.format(options.subject) for prompt in PROMPTS]
    shape = (len(prompts), *latent_shape(sd))
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rows, worst = [], 0
    for sampler in SAMPLERS:
        settings = {"steps": options.steps, "guidance": options.guidance, "sampler": sampler}
        ours = generate.text2img(sd, prompts, noise=noise, **settings)
        other = theirs(pipe, sampler, noise, options, prompts)
        rows += [list(ours), list(other)]
        gaps = np.abs(ours.astype(int) - other)
        worst = max(worst, gaps.max())
        for prompt, gap in zip(prompts, gaps, strict=True):
            print(f"{sampler:9} {gap.max():3d} at most, {gap.mean():.4f} on average: {prompt}")
    names = [f"{sampler}, {who}" for sampler in SAMPLERS for who in ("sdjax", "diffusers")]
    Image.fromarray(grid.sheet(rows, names, prompts)).save(options.out / "grid.png")
    print(f"largest difference {worst} of 255 (accepted: 1); pictures in {options.out / 'grid.png'}")
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
