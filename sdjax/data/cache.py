"""Caches decoded pictures, their moments and encoded prompts in files (store.py), keyed by content.

    kept([(examples, {(512, 512): [0, 1]})], sd, data)      # the same examples with "moments"
    texts = Texts(encode, "cache", digest)
    texts(ids)                                              # {"context": float32 [L C]}

A picture's key is Examples.content and its shape.  The key of moments adds the autoencoder's weights and type; the key
of a prompt is its ids and the text encoder's weights.  So nothing stale is used, and only new entries are computed.

A run with flips keeps each picture twice, as it is and mirrored: an autoencoder's moments of a mirrored picture are not
the mirrored moments.  Masks and conditions from files are read from the source at every step.

Several processes of a run divide the missing entries of a shared folder.  A process with its own folder fills that.
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
from sdjax.runtime import processes
from sdjax.stable_diffusion import StableDiffusion, to_pixels

FEW = 64  # most pictures whose moments a run keeps in memory without a folder
BARS = {"picture": "pictures", "moments": "latents"}
CHUNK, PIXELS = 64, 1 << 20  # most pictures, and most pixels, per call of the autoencoder
MIRRORED = "mirrored"  # in the keys of mirrored pictures
MANY = 4096  # beyond this number of pictures, one record marks a complete store and saves a look-up for each picture
Key = Callable[[int, bool], bytes]  # of a picture's number and of whether it is mirrored
Divided = tuple[Examples, Mapping[Shape, Sequence[int] | np.ndarray]]  # examples, {shape: numbers of an epoch}


class Kept(Examples):
    """Examples with pictures or moments from a store and everything else from the source.

    places: {"picture", "moments" or "row": (store, a function from a picture's number to its key)}.
    count: number of stored pictures.  flip: probability of the mirrored picture.
    beside: whether the source has masks or conditions to read.
    """

    def __init__(
        self,
        source: Examples,
        places: Mapping[str, tuple[Store | Memory, Key]],
        count: int,
        flip: float = 0.0,
        beside: bool = False,
    ) -> None:
        self.source, self.places, self.count = source, places, count
        self.flip, self.beside = flip, beside
        self.remote = beside and source.remote  # stored arrays are local

    def __len__(self) -> int:
        return len(self.source)

    def shape(self, i: int) -> Shape:
        """Returns (height, width) of picture i in the source."""
        return self.source.shape(i)

    def picture(self, i: int, size: int | Shape) -> np.ndarray:
        """Returns picture i without random augmentation, uint8 [h w 3]."""
        return self.source.picture(i, size)

    def view(self, i: int, size: int | Shape, mirrored: bool = False) -> dict[str, Any]:
        """Returns the central crop of picture i with its mask and condition, mirrored or not."""
        return self.source.view(i, size, mirrored)

    def caption(self, i: int, random: np.random.Generator) -> str:
        """Returns a caption of picture i."""
        return self.source.caption(i, random)

    def other(self, i: int, random: np.random.Generator) -> int:
        """Returns the number of another picture of the same subject."""
        return self.source.other(i, random)

    def epoch(self) -> Sequence[int] | np.ndarray:
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
        """Returns {"caption", "mirrored"[, "picture"][, "moments"][, "row"][, "mask"][, "condition"]} of picture i."""
        varies = self.flip or self.beside
        mirrored = bool(varies and random.random(3)[2] < self.flip)  # the same numbers as without a cache (Pictures)
        item = self.source.view(i, size, mirrored) if self.beside else {}
        item = {name: item[name] for name in item.keys() - {"picture"}}
        return {"caption": self.source.caption(i, random), "mirrored": mirrored, **item, **self.stored(i, mirrored)}

    def stored(self, i: int, mirrored: bool = False) -> dict[str, Any]:
        """Returns {name: array} of picture i for the names in `places`.  Raises ValueError for a damaged record."""
        item = {}
        for name, (store, of) in self.places.items():
            found = store.get(of(i, mirrored))
            if found is None:
                store.forget()
                raise ValueError(f"{store.path}: the {name} of picture {i} are damaged; run again, they are made anew")
            item |= {name: found[name]}
        return item


def kept(divided: Sequence[Divided], sd: StableDiffusion, data: Any, pictures: bool = False) -> list[Divided]:
    """Returns the examples with cached arrays from data.cache, or from memory; computes missing ones now.

    data: a run's Data.  With data.encode the arrays are the autoencoder's moments, float32 [h w 2c], and with
    `pictures` also the decoded pictures.  Without data.encode they are the pictures only.
    Examples stay unchanged if crops are random.  Without data.cache, data.encode keeps up to FEW pictures in memory;
    otherwise examples stay unchanged.
    """
    few = data.encode and sum(len(examples) for examples, _ in divided) <= FEW
    if data.crop != "center" or not (data.cache or few):
        return list(divided)
    filed = data.maker is not None and bool(data.maker.endings)
    made = []
    for examples, shapes in divided:
        beside = filed or (data.mask and not made)  # class pictures, the second ones, have no masks
        wanted = Wanted(examples, shapes, data.flip)
        places = {}
        if not data.encode or pictures:
            places["picture"] = _pictures(wanted, data.cache)
        if data.encode:
            places["moments"] = _moments(wanted, sd, data.cache)
        made.append((Kept(examples, places, len(wanted), data.flip, beside), shapes))
    return made


def picture(examples: Examples, i: int, shape: Shape, mirrored: bool = False) -> np.ndarray:
    """Returns picture i without random augmentation, mirrored or not, uint8 [h w 3]."""
    height, width = shape
    size = height if height == width else (height, width)
    return examples.view(i, size, True)["picture"] if mirrored else examples.picture(i, size)


class Wanted:
    """The pictures to store, each once, by shape, and mirrored if `flip` asks for it.  Takes 10 bytes per picture."""

    def __init__(
        self, examples: Examples, shapes: Mapping[Shape, Sequence[int] | np.ndarray], flip: float = 0.0
    ) -> None:
        self.examples, self.shapes = examples, list(shapes)
        self.variants = tuple(mirrored for mirrored in (False, True) if (flip if mirrored else flip < 1))
        self.numbers = [np.unique(np.asarray(numbers, np.int64)) for numbers in shapes.values()]
        self.which = np.zeros(len(examples), np.int16)
        for k, numbers in enumerate(self.numbers):
            self.which[numbers] = k

    def __len__(self) -> int:
        return sum(map(len, self.numbers))

    def shape(self, i: int) -> Shape:
        """Returns the shape that picture i is cut to."""
        return self.shapes[self.which[i]]

    def key(self, what: str, *more: Any) -> Key:
        """Returns a function from a picture's number to the key of its arrays."""
        return lambda i, mirrored: key(what, self.examples.content(i), *self.shape(i), *more, *[MIRRORED] * mirrored)

    def all(self, what: str, *more: Any) -> bytes:
        """Returns the key of the record that marks all of them as stored."""
        counts = [[*shape, len(numbers)] for shape, numbers in zip(self.shapes, self.numbers, strict=True)]
        variants = [MIRRORED * mirrored for mirrored in self.variants if self.variants != (False,)]
        return key(f"all {what}", self.examples.fingerprint(), counts, *more, *variants)

    def picture(self, i: int, mirrored: bool) -> np.ndarray:
        """Returns picture i, cut to its shape."""
        return picture(self.examples, i, self.shape(i), mirrored)


def _store(folder, name):
    return Store(Path(folder) / f"{name}.records") if folder else Memory()


def _fill(store, wanted, what, make, more=(), many=lambda shape: 1):
    """Computes missing arrays and returns wanted.key(what, *more).

    make(numbers, mirrored): returns the arrays of these pictures.  more: plain values that also decide the arrays.
    many(shape): number of pictures of a shape per call of make.
    """
    of, whole = wanted.key(what, *more), wanted.all(what, *more) if len(wanted) > MANY else b""
    shared = isinstance(store, Store) and processes.several()
    done = bool(whole) and not store.damaged and whole in store
    if store.damaged:
        print(f"{store.path}: {store.damaged} damaged records; made anew")
    if processes.every(done) if shared else done:
        return of

    def lacking():
        """Returns [(numbers, mirrored)] for the calls of make."""
        todo = []
        for shape, numbers in zip(wanted.shapes, wanted.numbers, strict=True):
            for mirrored in wanted.variants:
                new = np.fromiter((i for i in numbers.tolist() if of(i, mirrored) not in store), np.int64)
                todo += [(new[k : k + many(shape)], mirrored) for k in range(0, len(new), many(shape))]
        return todo

    def fill(todo):
        for numbers, mirrored in tqdm(todo, desc=BARS[what], unit="call", dynamic_ncols=True, disable=len(todo) < 2):
            for i, arrays in zip(numbers.tolist(), make(numbers.tolist(), mirrored), strict=True):
                store.put(of(i, mirrored), arrays)

    if shared:
        place, count = processes.place()
        todo = processes.together(lacking)  # none writes before all have looked
        processes.together(lambda: fill(todo[place::count]))
        store.look()
    fill(lacking())  # all of it in one process, or if the processes have folders of their own
    if whole:
        store.put(whole, {"count": np.array([len(wanted)])})
    store.settle()
    return of


def _pictures(wanted, folder):
    """Returns (store, key of a number) for the decoded pictures."""
    store = _store(folder, "pictures")

    def make(numbers, mirrored):
        return [{"picture": wanted.picture(i, mirrored)} for i in numbers]

    return store, _fill(store, wanted, "picture", make)


def _moments(wanted, sd, folder):
    """Returns (store, key of a number) for the moments of the pictures."""
    which = [trees.digest(sd.parts["vae"]), str(np.dtype(sd.networks["vae"].dtype))]
    encode = jax.jit(lambda sd, pixels: sd.moments(pixels))

    def many(shape):
        return max(1, min(CHUNK, PIXELS // (shape[0] * shape[1]), len(wanted)))

    def make(numbers, mirrored):
        block = np.stack([wanted.picture(i, mirrored) for i in numbers])
        padded = np.concatenate([block, np.repeat(block[:1], many(wanted.shape(numbers[0])) - len(block), 0)])
        found = np.asarray(encode(sd, to_pixels(padded)), np.float32)
        return [{"moments": one} for one in found[: len(block)]]

    store = _store(folder, "moments")
    return store, _fill(store, wanted, "moments", make, which, many)


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
