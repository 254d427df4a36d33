"""Caches decoded pictures, encoded pictures and encoded prompts in files (store.py), keyed by content.

    kept([(examples, {(512, 512): [0, 1]})], sd, data)      # the same examples with "moments"
    texts = Texts(encode, "cache", digest)
    texts(ids)                                              # {"context": float32 [L C]}

The key of a picture is its file's bytes (Examples.content) and shape.  Moments add the autoencoder's weights and type
to it; prompts use their ids and the text encoder's weights.  So nothing stale is used, and only new entries are
computed.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sdjax import trees
from sdjax.data.buckets import Shape
from sdjax.data.sources.source import Examples
from sdjax.data.store import Memory, Store, key
from sdjax.stable_diffusion import StableDiffusion, to_pixels

FEW = 64  # pictures whose moments a run keeps without a folder
CHUNK, PIXELS = 64, 1 << 20  # pictures, and pixels, per call of the autoencoder
Divided = tuple[Examples, Mapping[Shape, Sequence[int]]]  # examples, {shape: numbers of an epoch's pictures}


class Kept(Examples):
    """Examples with pictures or moments from a store and the rest from the source.

    places: {"picture" or "moments": (store, {number: key})}; cached moments replace the picture.
    """

    def __init__(self, source: Examples, places: Mapping[str, tuple[Store | Memory, Mapping[int, bytes]]]) -> None:
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.source)

    @property
    def numbers(self) -> set[int]:
        """The numbers of the pictures that are kept."""
        return {i for _, keys in self.places.values() for i in keys}

    def shape(self, i: int) -> Shape:
        """Returns (height, width) of picture i in the source."""
        return self.source.shape(i)

    def picture(self, i: int, size: int | Shape) -> np.ndarray:
        """Returns picture i without random augmentation, uint8 [h w 3]."""
        return self.source.picture(i, size)

    def caption(self, i: int, random: np.random.Generator) -> str:
        """Returns a caption of picture i."""
        return self.source.caption(i, random)

    def other(self, i: int, random: np.random.Generator) -> int:
        """Returns the number of another picture of the same subject."""
        return self.source.other(i, random)

    def epoch(self) -> Sequence[int]:
        """Returns the numbers of an epoch's pictures."""
        return self.source.epoch()

    def content(self, i: int) -> str:
        """Returns a digest of picture i."""
        return self.source.content(i)

    def fingerprint(self) -> list[Any]:
        """Returns what decides the pictures."""
        return self.source.fingerprint()

    def about(self) -> str:
        """Returns what there is, in words."""
        return self.source.about()

    def example(self, i: int, size: int | Shape, random: np.random.Generator) -> dict[str, Any]:
        """Returns {"caption"[, "picture"][, "moments"]} of picture i."""
        return {"caption": self.source.caption(i, random), **self.stored(i)}

    def stored(self, i: int) -> dict[str, Any]:
        """Returns {"picture" or "moments": array} of picture i."""
        item = {}
        for name, (store, keys) in self.places.items():
            found = store.get(keys[i])
            assert found is not None  # put there by `kept`
            item |= {name: found[name]}
        return item


def kept(divided: Sequence[Divided], sd: StableDiffusion, data: Any, pictures: bool = False) -> list[Divided]:
    """Returns the examples with what is kept of them in data.cache, or in memory; what is missing is made now.

    data: a run's Data.  With data.encode these are the autoencoder's moments, float32 [h w 2c], and with `pictures` the
    decoded pictures too; else those alone.  Returns the examples unchanged if pictures or masks vary, if conditions are
    files, or if there is no folder and either data.encode is off or there are more than FEW.
    """
    few = data.encode and sum(len(examples) for examples, _ in divided) <= FEW
    filed = data.maker is not None and data.maker.endings
    if not data.plain or data.mask or filed or not (data.cache or few):
        return list(divided)
    made = []
    for examples, shapes in divided:
        of = {i: shape for shape, numbers in shapes.items() for i in numbers}
        places = {}
        if not data.encode or pictures:
            keys = {i: key("picture", examples.content(i), *shape) for i, shape in of.items()}
            store = _store(data.cache, "pictures")
            _fill(store, keys, "pictures", lambda i, of=of, one=examples: [{"picture": picture(one, i, of[i])}])
            places["picture"] = store, keys
        if data.encode:
            places["moments"] = _moments(examples, of, sd, data.cache)
        made.append((Kept(examples, places), shapes))
    return made


def picture(examples: Examples, i: int, shape: Shape) -> np.ndarray:
    """Returns picture i without random augmentation, uint8 [h w 3]."""
    height, width = shape
    return examples.picture(i, height if height == width else (height, width))


def _store(folder, name):
    return Store(Path(folder) / f"{name}.records") if folder else Memory()


def _fill(store, keys, what, make, chunk=lambda i: (i, 1)):
    """Makes what the store lacks: make(*numbers) gives the arrays of each; chunk(i): (kind, how many of it at once)."""
    groups: dict[Any, list[int]] = {}
    for i in (i for i, name in keys.items() if name not in store):
        groups.setdefault(chunk(i), []).append(i)
    todo = [group[k : k + many] for (_, many), group in groups.items() for k in range(0, len(group), many)]
    if store.damaged:
        print(f"{store.path}: {store.damaged} damaged records; made anew")
    for numbers in tqdm(todo, desc=what, unit="call", dynamic_ncols=True, disable=len(todo) < 2):
        for i, arrays in zip(numbers, make(*numbers), strict=True):
            store.put(keys[i], arrays)


def _moments(examples, of, sd, folder):
    """Returns (store, keys) of the moments of pictures of these shapes, {number: (h, w)}."""
    which = [trees.digest(sd.parts["vae"]), str(np.dtype(sd.networks["vae"].dtype))]
    keys = {i: key("moments", examples.content(i), *shape, *which) for i, shape in of.items()}
    encode = jax.jit(lambda sd, pixels: sd.moments(pixels))

    def chunk(i):
        return of[i], max(1, min(CHUNK, PIXELS // (of[i][0] * of[i][1]), len(of)))

    def make(*numbers):
        block = np.stack([picture(examples, i, of[i]) for i in numbers])
        padded = np.concatenate([block, np.repeat(block[:1], chunk(numbers[0])[1] - len(block), 0)])
        found = np.asarray(encode(sd, to_pixels(padded)), np.float32)
        return [{"moments": one} for one in found[: len(block)]]

    store = _store(folder, "moments")
    _fill(store, keys, "latents", make, chunk)
    return store, keys


class Texts:
    """Cached outputs of a text encoder.

    encode: token ids [1 L] -> {name: array [1 ...]}.  which: a digest of everything else that decides the outputs.
    """

    def __init__(self, encode: Callable[[Any], Mapping[str, Any]], folder: str | Path, which: str) -> None:
        self.encode, self.which, self.store = encode, which, Store(Path(folder) / "texts.records")

    def __call__(self, ids: Any) -> dict[str, np.ndarray]:
        """Returns the arrays of a prompt's ids [L], or {text encoder: [L]}."""
        name = key("text", self.which, [np.asarray(x).tolist() for x in jax.tree.leaves(ids)])
        found = self.store.get(name)
        if found is None:
            made = self.encode(jax.tree.map(lambda x: np.asarray(x)[None], ids))
            found = {part: np.asarray(array[0], np.float32) for part, array in made.items()}
            self.store.put(name, found)
        return found
