"""Small models with noise in every weight, ours and as a pipeline of diffusers, and noise that both take."""

import dataclasses

import diffusers.models.autoencoders.vae
import jax
import jax.numpy as jnp
import numpy as np
import torch

import sdjax
from sdjax.formats import pipeline
from sdjax.formats.storage import parameters
from sdjax.images import resize
from sdjax.models.unet import UNet
from sdjax.sampling import job
from sdjax.sampling.settings import TextToImage

PROMPTS = ["a photo of a face on the beach", "a mosaic of a cat"]
NEGATIVE = ["red hair", ""]


def noised(params, seed=3):
    """Returns parameters with noise on top, so that none is zero."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.03 * random.standard_normal(x.shape, np.float32)), params)


def model(prediction="epsilon", **unet):
    """Returns the tiny model with other options of its UNet."""
    sd = pipeline.load("random:tiny")
    network = UNet(dataclasses.replace(sd.networks["unet"].config, **unet))
    return (
        sd.replace(schedule=dataclasses.replace(sd.schedule, prediction_type=prediction))
        .with_networks(unet=network)
        .with_parts(
            unet=noised(parameters.random_parameters(network, "float32")),
            vae=noised(sd.parts["vae"]),
            text_encoder=noised(sd.parts["text_encoder"]),
        )
    )


def theirs(sd, folder, kind, **parts):
    """Returns the pipeline of diffusers, of class `kind`, that loads what we save."""
    sdjax.save(sd, folder)
    pipe = kind.from_pretrained(folder, low_cpu_mem_usage=False, safety_checker=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count=2, size=32, seed=0):
    """Returns smooth pictures uint8 [B H W 3]."""
    rough = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return np.stack([resize.fit(one, (size, size), "stretch") for one in rough])


def start_noise(seeds, shape=(16, 16, 4)):
    """Returns the noise that pictures of these seeds start from."""
    return job.job(TextToImage, [""] * len(seeds), seeds=seeds).start_noise(shape)


def picture_noise(seeds, shape=(16, 16, 4)):
    """Returns the noise that belongs to the given pictures of these seeds."""
    return job.picture_noise(job.job(TextToImage, [""] * len(seeds), seeds=seeds).keys, shape)


def give(monkeypatch, module, *noises):
    """Lets diffusers draw these noises [B h w c], in this order, in a pipeline's module and in autoencoders."""
    queue = [torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2).copy()) for noise in noises]

    def draw(shape, **options):
        noise = queue.pop(0)
        assert tuple(noise.shape) == tuple(shape)
        return noise

    for place in (module, diffusers.models.autoencoders.vae):
        monkeypatch.setattr(place, "randn_tensor", draw)
    return queue


def difference(ours, theirs):
    """Returns the largest difference, of 255, between our pictures and theirs (floats, 0 to 1)."""
    return np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max()
