"""All pictures of a run on the device, where a batch looks up its rows by number.

    tables, examples = resident(examples, {(128, 128): [0, 1, 2]}, sd, data)
    tables((128, 128), {"row": [2, 0], ...})         # {"moments" or "pixels": [2 ...], ...}

`data.workers` processes decode each picture once.  data.cache keeps them as one array per shape for later runs.  With
data.encode the autoencoder encodes them on the device when the run starts.
"""

import itertools
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from sdjax.data import cache
from sdjax.data.buckets import Shape
from sdjax.data.cache import Kept
from sdjax.data.sources.source import Examples
from sdjax.data.store import Memory, key
from sdjax.formats.storage import files
from sdjax.stable_diffusion import StableDiffusion, to_pixels

CHUNK = 256  # pictures that a process decodes per task
PIXELS = 1 << 22  # most pixels per call of the autoencoder


class Tables:
    """The arrays of a run on its device: {shape: {"pictures" uint8 [N h w 3], "moments" float32 [N h w 2c]}}."""

    def __init__(self, arrays: Mapping[Shape, Mapping[str, Array]]) -> None:
        self.arrays = arrays

    def __call__(self, shape: Shape, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch of a shape with its numbers "row" and "other" replaced by arrays."""
        table, rest = self.arrays[shape], {name: x for name, x in batch.items() if name not in ("row", "other")}
        if "moments" in table:
            rest["moments"] = _rows(table["moments"], batch["row"])
        else:
            rest["pixels"] = _pixels(table["pictures"], batch["row"])
        if "other" in batch:
            rest["concept"] = _pixels(table["pictures"], batch["other"])
        return rest


def resident(
    examples: Examples, shapes: Mapping[Shape, Sequence[int] | np.ndarray], sd: StableDiffusion, data: Any
) -> tuple[Tables, Kept]:
    """Returns the Tables of the pictures of these shapes, and the examples with each picture's "row" in its table.

    data: a run's Data.
    """
    arrays, rows = {}, Memory()
    keys = {int(i): str(i).encode() for numbers in shapes.values() for i in numbers}
    for shape, numbers in shapes.items():
        some = np.unique(np.asarray(numbers, np.int64)).tolist()
        for row, i in enumerate(some):
            rows.put(keys[i], {"row": np.asarray(row, np.int32)})
        pictures = jnp.asarray(_pictures(examples, some, shape, data))
        arrays[shape] = {"moments": _moments(sd, pictures)} if data.encode else {}
        if not data.encode or data.concept:
            arrays[shape]["pictures"] = pictures
    return Tables(arrays), Kept(examples, {"row": (rows, lambda i, _: keys[i])}, len(keys))


@jax.jit
def _rows(table, row):
    return table[row]


@jax.jit
def _pixels(table: UInt8[Array, "N h w 3"], row: Any) -> Float[Array, "B h w 3"]:
    """Returns pixels in [-1, 1], from numpy's values: XLA's division by 127.5 differs in the last bits."""
    return jnp.asarray(to_pixels(np.arange(256)))[table[row].astype(jnp.int32)]


def _moments(sd, pictures):
    """Returns the autoencoder's moments float32 [N h w 2c] of pictures [N H W 3], computed chunk by chunk."""
    encode = jax.jit(lambda sd, table, row: sd.moments(_pixels(table, row)).astype(jnp.float32))
    many = max(1, min(len(pictures), PIXELS // (pictures.shape[1] * pictures.shape[2])))
    place = np.minimum(np.arange(-(-len(pictures) // many) * many), len(pictures) - 1).reshape(-1, many)
    return jnp.concatenate([encode(sd, pictures, row) for row in place])[: len(pictures)]


def _pictures(examples, numbers, shape, data):
    """Returns the pictures [N h w 3] with these numbers, from data.cache if they are there."""
    size = (len(numbers), *shape, 3)
    if not data.cache:
        found = np.empty(size, np.uint8)
        return _fill(found, examples, numbers, shape, data.workers)
    name = key("resident", shape, [examples.content(i) for i in numbers]).hex()
    path = Path(data.cache) / f"pictures-{name}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.check_room(path, int(np.prod(size)))
        with files.new_file(path) as temporary:
            made = np.lib.format.open_memmap(temporary, "w+", np.uint8, size)
            _reserve(temporary)
            _fill(made, examples, numbers, shape, data.workers).flush()
    return np.load(path, mmap_mode="r")


def _reserve(path):
    """Allocates a file's blocks: writing to a sparse mapped file on a full disk ends the process with SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _fill(found, examples, numbers, shape, workers):
    bar = tqdm(made(examples, numbers, shape, workers), "pictures", len(numbers), dynamic_ncols=True)
    for place, picture in enumerate(bar):
        found[place] = picture
    return found


def made(
    examples: Examples, numbers: Sequence[int], shape: Shape, workers: int = 0
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yields the pictures with these numbers in this shape, in order.

    workers: processes that decode them; 0 for this process.
    """
    chunks = [numbers[k : k + CHUNK] for k in range(0, len(numbers), CHUNK)]
    if not workers:
        yield from itertools.chain.from_iterable(_chunk(examples, some, shape) for some in chunks)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        parts = pool.map(_chunk, itertools.repeat(examples), chunks, itertools.repeat(shape))
        yield from itertools.chain.from_iterable(parts)


def _chunk(examples, numbers, shape):
    """Returns the pictures with these numbers, [n h w 3]."""
    return np.stack([cache.picture(examples, i, shape) for i in numbers])
