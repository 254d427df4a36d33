"""Pictures during training, with fixed seeds: what the run has learned so far."""

import numpy as np
from PIL import Image

from sdjax.methods.clip import Clip
from sdjax.methods.e4t import look
from sdjax.methods.vae import Vae
from sdjax.sampling import generate
from sdjax.stable_diffusion import to_pictures

SEEDS, STEPS = 4, 20


def write(path, method, sd, data, settings):
    """Writes a grid: prompts by seeds; pictures above their reconstructions for an autoencoder; nothing for Clip.

    Where the data show an encoder its subjects (data.concept), a row each: the subject, then a picture per prompt.
    Pictures that cannot be made are said, and are not the end of a run.
    """
    if isinstance(method, Clip):
        return
    try:
        rows = _rows(method, sd, data, settings)
    except ValueError as error:
        print(f"preview: no {path.name}: {error}")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(rows)).save(path)


def _rows(method, sd, data, settings):
    """Returns the rows of pictures of the grid."""
    prompts = settings.prompts or (f"a photo of {settings.data.word or 'a face'}",)
    if isinstance(method, Vae):
        pixels = data[0]["pixels"][:8]
        return [to_pictures(pixels), to_pictures(sd.decode(sd.encode(pixels)))]
    if settings.data.concept:
        subjects = data[0]["concept"][:SEEDS]
        return [(*to_pictures(x[None]), *_pictures(look(sd, x), prompts, [0] * len(prompts))) for x in subjects]
    return [_pictures(sd, [prompt] * SEEDS, range(SEEDS)) for prompt in prompts]


def _pictures(sd, prompts, seeds):
    return generate.text2img(sd, list(prompts), seeds=seeds, steps=STEPS)


def grid(rows):
    """Returns one picture of rows of equal pictures, uint8 [rows * H, columns * W, 3]."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
