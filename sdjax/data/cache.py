"""Pictures decoded once and encoded once: files on disk, made whole, found again by what they hold.

A file's name holds a digest of the pictures' source, the size and, for latents, the autoencoder's weights, so nothing
stale is used.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float16, Shaped, UInt8
from tqdm import tqdm

from sdjax import trees
from sdjax.data.sources.source import Examples
from sdjax.formats.storage import files
from sdjax.stable_diffusion import StableDiffusion, to_pixels

CHUNK = 64  # pictures per call of the autoencoder


class Cached(Examples):
    """Examples whose pictures, and moments where encoded, come from files, of one size; the rest is the source's."""

    def __init__(
        self,
        source: Examples,
        pictures: UInt8[np.ndarray, "n S S 3"],
        moments: Float16[np.ndarray, "n h w 2*c"] | None = None,
    ):
        self.source, self.pictures, self.moments = source, pictures, moments

    def __len__(self) -> int:
        return len(self.source)

    def shape(self, i: int) -> tuple[int, int]:
        """Returns (height, width) of picture i."""
        height, width = self.pictures.shape[1:3]
        return height, width

    def picture(self, i: int, size: int) -> UInt8[np.ndarray, "S S 3"]:
        """Returns picture i, uint8 [S S 3], S the size of all."""
        return self.pictures[i]

    def caption(self, i: int, random: np.random.Generator) -> str:
        """Returns a caption of picture i."""
        return self.source.caption(i, random)

    def other(self, i: int, random: np.random.Generator) -> int:
        """Returns the number of another picture of the same subject."""
        return self.source.other(i, random)

    def epoch(self) -> Sequence[int]:
        """Returns the numbers of an epoch's pictures."""
        return self.source.epoch()

    def chosen(self) -> Sequence[int] | None:
        """Returns the numbers of those pictures that the run asks for."""
        return self.source.chosen()

    def fingerprint(self) -> list[Any]:
        """Returns what decides the pictures."""
        return self.source.fingerprint()

    def about(self) -> str:
        """Returns what there is, in words."""
        return self.source.about()

    def example(self, i: int, size: int, random: np.random.Generator) -> dict[str, Any]:
        """Returns {"picture", "caption"[, "moments"]} of picture i."""
        item = {"picture": self.pictures[i], "caption": self.source.caption(i, random)}
        return item if self.moments is None else {**item, "moments": self.moments[i]}


def cached(source: Examples, sd: StableDiffusion, folder: str | Path, size: int, encode: bool = True) -> Cached:
    """Returns the source with its pictures, without random augmentation, read from files below `folder`.

    encode: also the autoencoder's moments, float16 [n h w 2c].  What is missing is made now.
    """
    pictures = _file(folder, ["pictures", source.fingerprint(), size], lambda file: _draw(source, size, file))
    if not encode:
        return Cached(source, pictures)
    name = [
        "moments",
        source.fingerprint(),
        size,
        trees.digest(sd.parts["vae"]),
        str(np.dtype(sd.networks["vae"].dtype)),
    ]
    return Cached(source, pictures, _file(folder, name, lambda file: _encode(pictures, sd, file)))


def _file(folder: str | Path, name: list[Any], make: Callable[[Path], None]) -> Shaped[np.ndarray, "n ..."]:
    """Returns the array in the file named by a digest of `name`, read as it is needed; made whole or not at all."""
    digest = hashlib.sha256(json.dumps(name).encode()).hexdigest()[:16]
    done = Path(folder) / f"{name[0]}-{digest}.npy"
    if not done.exists():
        with files.new_file(done) as work:
            make(work)
    return np.load(done, mmap_mode="r")


def _draw(source: Examples, size: int, file: Path) -> None:
    first = source.picture(0, size)
    pictures = _open(file, np.uint8, (len(source), *first.shape))
    for i in tqdm(range(len(source)), desc="pictures", unit="picture", dynamic_ncols=True):
        pictures[i] = source.picture(i, size)
    pictures.flush()


def _encode(pictures: UInt8[np.ndarray, "n S S 3"], sd: StableDiffusion, file: Path) -> None:
    moments = jax.jit(lambda sd, pixels: sd.moments(pixels))
    out = None
    for first in tqdm(range(0, len(pictures), CHUNK), desc="latents", unit="chunk", dynamic_ncols=True):
        block = np.asarray(pictures[first : first + CHUNK])
        padded = np.concatenate([block, np.repeat(block[:1], CHUNK - len(block), 0)])
        encoded = np.asarray(moments(sd, to_pixels(padded))[: len(block)], np.float16)
        if out is None:
            out = _open(file, np.float16, (len(pictures), *encoded.shape[1:]))
        out[first : first + len(block)] = encoded
    if out is not None:
        out.flush()


def _open(file: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """Returns the array of a new file.  Raises ValueError where it has no room: a full disk would end the process."""
    files.check_room(file, np.dtype(dtype).itemsize * int(np.prod(shape)))
    return np.lib.format.open_memmap(file, "w+", dtype, shape)
