"""Pictures during training, with fixed seeds: what the run has learned so far."""

import numpy as np
from PIL import Image

from sdjax import generate
from sdjax.methods.clip import Clip
from sdjax.methods.vae import Vae
from sdjax.stable_diffusion import to_pictures

SEEDS, STEPS = 4, 20


def write(path, method, sd, data, settings):
    """Writes a grid: prompts by seeds, or for an autoencoder pictures above their reconstructions.  None for Clip."""
    if isinstance(method, Clip):
        return
    if isinstance(method, Vae):
        pixels = data[0]["pixels"][:8]
        rows = [to_pictures(pixels), to_pictures(sd.decode(sd.encode(pixels)))]
    else:
        prompts = settings.prompts or (f"a photo of {settings.data.word or 'a face'}",)
        rows = [generate.text2img(sd, [prompt] * SEEDS, seeds=range(SEEDS), steps=STEPS) for prompt in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(rows)).save(path)


def grid(rows):
    """Returns one picture of rows of equal pictures, uint8 [rows * H, columns * W, 3]."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
