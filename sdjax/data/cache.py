"""Pictures decoded once and encoded once: files on disk, made whole, found again by what they hold.

The folder's name is a digest of the pictures' source, the size and the autoencoder's weights, so nothing stale is used.
"""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sdjax import trees
from sdjax.stable_diffusion import to_pixels

CHUNK = 64  # pictures per call of the autoencoder


class Cached:
    """A source whose pictures and moments come from a cache; captions stay the source's."""

    def __init__(self, source, folder):
        self.source = source
        self.pictures = np.load(folder / "pictures.npy", mmap_mode="r")
        self.latents = np.load(folder / "moments.npy", mmap_mode="r") if (folder / "moments.npy").exists() else None

    def __len__(self):
        return len(self.source)

    def other(self, i, random):
        """Returns the number of another picture of the same subject."""
        return self.source.other(i, random)

    def example(self, i, random):
        """Returns {"picture", "caption"[, "moments"]} of picture i."""
        item = {"picture": self.pictures[i], "caption": self.source.caption(i, random)}
        return item if self.latents is None else {**item, "moments": self.latents[i]}


def cached(source, sd, folder, size):
    """Returns the source read from a cache below `folder`, which is made on first use.

    Pictures are the source's without random augmentation; moments float16 [n h w 2c].
    """
    name = hashlib.sha256(json.dumps([source.fingerprint(), size, trees.digest(sd.vae)]).encode()).hexdigest()[:16]
    done = Path(folder) / name
    if not done.exists():
        work = done.with_name(name + ".part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _fill(source, sd, work)
        work.rename(done)
    return Cached(source, done)


def _fill(source, sd, folder):
    moments = jax.jit(lambda sd, pixels: sd.moments(pixels))
    pictures = latents = None
    for first in tqdm(range(0, len(source), CHUNK), desc="cache", unit="chunk", dynamic_ncols=True):
        numbers = range(first, min(first + CHUNK, len(source)))
        block = np.stack([source.picture(i) for i in numbers])
        padded = np.concatenate([block, np.repeat(block[:1], CHUNK - len(block), 0)])
        encoded = np.asarray(moments(sd, to_pixels(padded))[: len(block)], np.float16)
        if pictures is None:
            make = np.lib.format.open_memmap
            pictures = make(folder / "pictures.npy", "w+", np.uint8, (len(source), *block.shape[1:]))
            latents = make(folder / "moments.npy", "w+", np.float16, (len(source), *encoded.shape[1:]))
        pictures[first : first + len(block)], latents[first : first + len(block)] = block, encoded
    pictures.flush()
    latents.flush()
