"""Batches as a function of the step: what a run sees at step n depends on the seed and n, never on how it got there.

    data = build(Data(path="photos/cat", word="a sks cat", batch=4), sd, seed=0)
    for batch in data.iterate(start=400): ...

A batch: "ids" int32 [B L], "index" int32 [B] (the example's number in the stream), "weight" float32 [B], and either
"pixels" float32 [B S S 3] in [-1, 1] or, where they are kept, "moments" [B h w 2c]; "mask" [B h w 1], "concept"
[B S S 3] and "class_ids" [B L], the class prompts, where asked for.  Pictures of the class are the last rows of every
batch; "weight" makes the mean over the batch mean(subject) + lambda mean(class).
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from sdjax import settings
from sdjax.data import cache, sources
from sdjax.data.classes import ClassData
from sdjax.data.sources.source import Examples, Only, Source
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion, to_pixels

CONCEPTS = ("", "same", "other")
CROPS = ("center", "random")
MOST = 4096  # prompts that are looked through for a word
THREADS, AHEAD = 2, 8  # decoding threads, and examples that wait for the device


@dataclass(frozen=True)
class Data:
    """Which pictures and words.

    path: a folder of images, one image, or "pocketland" (the drawn world).  A folder's captions lie in NAME.txt,
    NAME.caption or metadata.jsonl, its masks in NAME.mask.png or the alpha channel; each sub-folder is a subject.
    The pictures of a sub-folder "10_sks dog" are shown 10 times an epoch, those without a caption as "sks dog".
    source: settings of such pictures alone, found as data.NAME too; None for their defaults.
    word: what captions call the subject; "" for the word that the method trains.
    templates: "captions" (beside the pictures, or drawn with them), "object", "style", "face", ... or a template file.
    size: pixels of the square picture, 0 for the model's.  crop: "center" or "random".  flip: probability.
    dropout: probability of the empty prompt, for guidance.
    encode: train on the autoencoder's moments, computed once where pictures are kept: those in `cache`, a folder for
    decoded pictures and moments ("" for none), and one picture without augmentation.
    concept: also give E4T's encoder a picture: "same", or "other" view of the subject where the source knows one.
    validation: a folder of pictures that are only measured (Train.validate), or the share of `path`'s that is.
    mask: weight the loss by the image's mask file (its alpha where something is clear, else white), or by its alpha.
    """

    path: str = ""
    source: Source | None = None
    word: str = ""
    templates: str = "captions"
    size: int = 0
    batch: int = 4
    crop: str = "center"
    flip: float = 0.0
    dropout: float = 0.0
    cache: str = ""
    encode: bool = True
    concept: str = ""
    mask: bool = False
    validation: str | float = 0.0

    def __post_init__(self):
        settings.check(
            self, concept=CONCEPTS, size=settings.FROM_0, batch=settings.FROM_1, dropout=settings.TO_1,
            crop=CROPS, flip=settings.TO_1,
        )  # fmt: skip
        if not isinstance(self.validation, str):
            settings.check(self, validation=settings.BELOW_1)
        if self.cache and (not self.plain or self.mask):
            raise SettingError("cache", self.cache, "'' unless crop=center, flip=0, mask=False: pictures stay as kept")

    def looked_up(self) -> tuple[str, Source | None]:
        """Returns ("source", the source of `path`): where a setting that is not here is looked up."""
        return "source", self.source or sources.matching(self.path)

    @property
    def plain(self) -> bool:
        """Whether a picture is the same each time it is seen."""
        return self.crop == "center" and not self.flip


@dataclass(frozen=True)
class Share:
    """The rows of every batch that show one source's pictures.

    first, count: which rows.  weight: of each in the loss.  moments: [h w 2c] of a source of one picture, where kept.
    order: picture number epoch[order[k]] is the k-th that is shown.
    """

    source: Examples
    first: int
    count: int
    weight: float
    moments: np.ndarray | None
    order: Any
    epoch: Any

    def place(self, position: int, batch: int) -> int:
        """Returns the number among this source's pictures of what the global stream holds at `position`."""
        step, row = divmod(position, batch)
        return step * self.count + row - self.first


class Batches:
    """The stream of a run; `single`: the pixels [S S 3] where the source is one picture, else None.

    classes: (settings, pictures or None) of the subject's class.
    """

    def __init__(
        self,
        data: Data,
        source: Examples,
        size: int,
        sd: StableDiffusion,
        seed: int,
        classes: tuple[ClassData, Examples | None] = (ClassData(), None),
    ) -> None:
        self.data, self.source, self.size, self.seed = data, source, size, seed
        self.tokenizer, self.factor = sd.tokenizer, sd.factor
        self.single = to_pixels(source.picture(0, size)) if len(source) == 1 else None
        self.classes, others = classes
        self.rows = data.batch // jax.process_count()
        if data.batch % jax.process_count():
            raise ValueError(f"data.batch={data.batch}: {jax.process_count()} processes must divide it")
        less = 0 if others is None else self.classes.rows_of(data.batch)
        alone = data.encode and data.plain and len(source) == 1 and (others is None or len(others) == 1)
        self.shares = [self._share(source, 0, data.batch - less, 1.0, sd if alone else None)]
        if others is not None:
            part = self.classes.weight
            self.shares.append(self._share(others, data.batch - less, less, part, sd if alone else None))

    def _share(self, source, first, count, part, sd=None):
        """Returns the Share of a source whose mean loss counts `part`; sd: encodes its one picture."""
        import grain

        moments, epoch = None, source.epoch()
        if sd is not None:
            pixels = to_pixels(source.picture(0, self.size))[None]
            moments = np.asarray(jax.jit(lambda sd, x: sd.moments(x))(sd, pixels)[0], np.float32)
        order = grain.MapDataset.range(len(epoch)).seed(self.seed).shuffle().repeat()
        return Share(source, first, count, part * self.data.batch / count, moments, order, epoch)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """Returns this process's rows of the batch of a step."""
        return next(self.iterate(step, threads=0))

    def steps(self, epochs: float) -> int:
        """Returns the number of batches that show every picture so many times, the last one filled up."""
        return math.ceil(epochs * len(self.source.epoch()) / self.data.batch)

    def mentions(self, tokens: np.ndarray) -> bool:
        """Returns whether any of up to MOST of the source's prompts holds one of these token ids."""
        captions = (
            self.source.caption(i, np.random.default_rng((self.seed, i))) for i in range(min(len(self.source), MOST))
        )
        return any(np.isin(self.tokenizer([caption]), tokens).any() for caption in captions)

    def iterate(self, start: int = 0, threads: int = THREADS) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's rows of the batches of steps start, start + 1, ...; decoding runs ahead in threads."""
        import grain

        first = start * self.rows
        stream = grain.MapDataset.range(first, 1 << 40).map(lambda q: self._example(self._position(q)))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * self.rows if threads else 0)
        return iter(stream.batch(self.rows).to_iter_dataset(options))

    def _position(self, q):
        """Returns the place in the global stream of this process's q-th example."""
        return q // self.rows * self.data.batch + jax.process_index() * self.rows + q % self.rows

    def _example(self, position):
        """Returns the example at a place of the stream; its picture is the next one of the row's share."""
        random = np.random.default_rng((self.seed, position))
        share = [share for share in self.shares if share.first <= position % self.data.batch][-1]
        i = share.epoch[int(share.order[share.place(position, self.data.batch)])]
        item = share.source.example(i, self.size, random)
        caption = "" if random.random() < self.data.dropout else item["caption"]
        example = {
            "ids": self._ids(caption),
            "index": np.int32(position % (1 << 31)),
            "weight": np.float32(share.weight),
        }
        if self.classes.identifiers:
            example["class_ids"] = self._ids(self.classes.prompt(caption))
        if share.moments is not None:
            example["moments"] = share.moments
        elif "moments" in item:
            example["moments"] = item["moments"].astype(np.float32)
        else:
            example["pixels"] = to_pixels(item["picture"])
        if self.data.concept:
            other = self.data.concept == "other"
            seen = share.source.example(share.source.other(i, random), self.size, random) if other else item
            example["concept"] = to_pixels(seen["picture"])
        if self.data.mask:
            whole = np.ones((self.size, self.size), np.float32)  # class pictures have none
            example["mask"] = _shrink(item.get("mask", whole), self.factor)
        return example

    def _ids(self, caption):
        return np.asarray(self.tokenizer([caption])[0], np.int32)


def _shrink(mask, factor):
    """Returns the mean of every factor x factor tile of a mask [S S], as [S/factor S/factor 1]."""
    side = mask.shape[0] // factor
    return mask.reshape(side, factor, side, factor).mean((1, 3), dtype=np.float32)[..., None]


def side(data: Data, sd: StableDiffusion) -> int:
    """Returns the pixels of a side of a run's square pictures: data.size, or the model's.

    Raises SettingError for one that the autoencoder cannot halve evenly.
    """
    size = data.size or sd.networks["unet"].config.sample_size * sd.factor
    if size % sd.factor:
        raise SettingError("data.size", size, f"a multiple of {sd.factor} for this model")
    return size


def build(
    data: Data,
    sd: StableDiffusion,
    seed: int,
    source: Examples | None = None,
    classes: ClassData = ClassData(),  # noqa: B008 a frozen value
    others: Examples | None = None,
) -> Batches:
    """Returns the Batches of a run for a model (its tokenizer, its picture size, its autoencoder for the cache).

    source: the examples that sources.open(data) gave; None opens them.  others: those of classes.path.
    Raises ValueError for a path that holds no pictures, and for sizes that the autoencoder cannot halve evenly.
    """
    source = sources.open(data) if source is None else source
    if others is None and classes.path:
        others = sources.open(classes.data(data))
    numbers, apart = source.chosen(), _apart(data, source, seed)
    if apart:
        numbers = [i for i in (range(len(source)) if numbers is None else numbers) if i not in apart]
    size = side(data, sd)
    if others is not None:
        others = _ready(data, sd, size, others, others.chosen())
    return Batches(data, _ready(data, sd, size, source, numbers), size, sd, seed, (classes, others))


def held_out(data: Data, sd: StableDiffusion, seed: int) -> Batches | None:
    """Returns the Batches of the pictures that a run only measures, never augmented; None where there are none."""
    if not data.validation:
        return None
    plain, size = measured(data), side(data, sd)
    source = sources.open(plain)
    numbers = None if isinstance(data.validation, str) else sorted(_apart(data, source, seed))
    return Batches(plain, _ready(plain, sd, size, source, numbers), size, sd, seed)


def measured(data: Data) -> Data:
    """Returns the settings of the pictures that a run only measures."""
    plain = replace(data, crop="center", flip=0.0, dropout=0.0, validation=0.0)
    return replace(plain, path=data.validation, source=None) if isinstance(data.validation, str) else plain


def _apart(data, source, seed):
    """Returns the numbers of the pictures that are held out of the source: data.validation's share, at least one."""
    if not data.validation or isinstance(data.validation, str):
        return set()
    numbers = list(range(len(source)) if (chosen := source.chosen()) is None else chosen)
    if len(numbers) == 1:
        raise SettingError("data.validation", data.validation, "0, or a folder: there is only one picture")
    count = min(max(1, round(data.validation * len(numbers))), len(numbers) - 1)
    order = np.random.default_rng((seed, zlib.crc32(b"validation"))).permutation(len(numbers))
    return {numbers[i] for i in order[:count]}


def _ready(data, sd, size, source, numbers):
    """Returns the source's pictures of these numbers, None for all; kept in files where data.cache says where."""
    if data.cache:
        source = cache.cached(source, sd, data.cache, size, data.encode)
    return source if numbers is None else Only(source, numbers)
