"""Small random pipelines of diffusers, the same model here, and how both compute: what tests of adapters share."""

import copy
import functools
import tempfile
from pathlib import Path

import diffusers
import jax
import numpy as np
import torch
from test_folder import TEXTS, channels_first, channels_last, make_pipeline

import sdjax
from sdjax.formats import pipeline
from sdjax.models.reference import Reference

STEPS, GUIDANCE = 3, 4.0


@functools.cache
def made(kind):
    """Returns (diffusers' pipeline, our model) of the same random weights; kind: "sd1" or "sd2"."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = make_pipeline(kind, Path(folder))
        return theirs, pipeline.load(Path(folder) / "model")


def fresh(kind):
    """Returns a copy of diffusers' pipeline that may be changed."""
    return copy.deepcopy(made(kind)[0])


def tensors(seed, **shapes):
    """Returns {name: noise} of PyTorch, of standard deviation 0.3."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
def outputs_there(theirs, texts=TEXTS):
    """Returns (context, prediction) of diffusers' pipeline at noise of seed 0."""
    texts = [theirs.maybe_convert_prompt(text, theirs.tokenizer) for text in texts]
    options = {"padding": "max_length", "truncation": True, "max_length": 16, "return_tensors": "pt"}
    context = theirs.text_encoder(theirs.tokenizer(texts, **options).input_ids)[0]
    z, t = _inputs(len(texts), theirs.unet.config.in_channels)
    prediction = theirs.unet(channels_first(z), torch.from_numpy(t), context).sample
    return context.numpy(), channels_last(prediction).numpy()


@jax.jit
def compute(sd, ids, z, t):
    cond = sd.condition(ids)
    return cond.unet.context, sd.predict(z, t, cond)


def outputs_here(sd, texts=TEXTS):
    """Returns (context, prediction) of our model at noise of seed 0; with or without adapters it is one program."""
    return compute(sd.bare.replace(reference=Reference()), sd.tokenize(texts), *_inputs(len(texts), 4))


def _inputs(rows, channels):
    random = np.random.default_rng(0)
    return random.standard_normal((rows, 8, 8, channels)).astype(np.float32), np.array([7.0, 901.0][:rows], np.float32)


def assert_same(sd, theirs, tolerance=2e-5, moved=None, **options):
    """Asserts that text encoder and UNet agree to a part of the largest number, and that they left `moved` behind."""
    for ours, wanted in zip(outputs_here(sd, **options), outputs_there(theirs, **options), strict=True):
        assert np.abs(ours - wanted).max() <= tolerance * np.abs(wanted).max()
    if moved is not None:
        before, after = outputs_here(moved)[1], outputs_here(sd)[1]
        assert np.abs(before - after).max() > 1e-2 * np.abs(before).max()


def assert_same_picture(sd, theirs, text=TEXTS[0]):
    """Asserts that three steps of DDIM give pictures within 1 of 255 of diffusers' pipeline."""
    ddim = {"clip_sample": False, "set_alpha_to_one": False}
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, **ddim)
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(1).standard_normal((1, 8, 8, 4)).astype(np.float32)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np", "height": 16, "width": 16}
    wanted = theirs(text, latents=channels_first(noise), **options).images
    ours = sdjax.text2img(
        sd.replace(reference=Reference()), [text], steps=STEPS, guidance=GUIDANCE, size=16, noise=noise
    )
    assert np.abs(ours.astype(int) - np.round(wanted * 255).astype(int)).max() <= 1
    assert ours.std() > 5
