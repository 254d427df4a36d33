"""Batches as a function of the step: the batch of step n depends on the seed and n only.

    data = build(Data(path="photos/cat", word="a sks cat", batch=4), sd, seed=0)
    for batch in data.iterate(start=400): ...

A batch holds:
    ids        {text encoder: int32 [B L]}, or [B chunks L]
    index      int32 [B], the example's number in the stream
    weight     float32 [B], the row's weight in the loss
    pixels     float32 [B H W 3] in [-1, 1]; H W is the size of the batch's bucket
    moments    float32 [B h w 2c], cached, instead of pixels
and for the settings that need them:
    mask       float32 [B h w 1]
    concept    float32 [B H W 3] in [-1, 1], for E4T's encoder
    class_ids  the same of the class prompts
    control    {"hint": float32 [B H W 3] in [0, 1]}, for a ControlNet
    text       cached UNet inputs

Class pictures are the last rows, in the shape of the batch's subjects.  With the weights, the mean loss over the batch
is mean(subject) + lambda mean(class).
"""

import copy
import functools
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdjax import conditions, settings
from sdjax.data import buckets, cache, lengths, resident, sources, splits, stream, tags
from sdjax.data.buckets import Plan
from sdjax.data.classes import ClassData
from sdjax.data.sources.source import Examples, Only, Source
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion, to_pixels
from sdjax.text import conditioning

CONCEPTS = ("", "same", "other")
CROPS = ("center", "random")
MOST = 4096  # prompts searched for a word
THREADS = min(16, max(2, os.cpu_count() or 2))  # decoding threads
REMOTE = 16  # least number of threads that read from a network


@dataclass(frozen=True)
class Data:
    """Pictures and prompts of a run.

    path: a folder of images, one image, "pocketland" (the drawn world), or tar shards, parquet or Arrow files, also in
    a bucket ("s3://bucket/photos"); "#SPLIT" behind it names a split.  Captions of a folder are in NAME.txt,
    NAME.caption or metadata.jsonl, masks in NAME.mask.png or the alpha channel.  Each sub-folder is a subject; "10_sks
    dog" repeats its pictures 10 times per epoch and uses "sks dog" for those without a caption.
    source: settings of the picture source, also available as data.NAME; None uses the defaults.
    word: the subject's word in captions; "" is the word that the method trains.
    words: (sub-folder, word) pairs for several subjects in one run: (("cat", "<my-cat>"), ("dog", "<my-dog>")).
    templates: "captions" (from the pictures), a list of templates ("object", "style", "face" ...) or a template file.
    size: side of the square picture in pixels; 0 is the model's.
    buckets: largest number of aspect ratios with about size^2 pixels; 0 uses squares.  Each picture goes to the shape
    that crops least; none is enlarged.  Only shapes that the pictures need are used, one for a folder of squares; each
    compiles a program.
    batch: rows per step over all devices.
    crop: "center" or "random".  flip: probability of mirroring; 0 with "openpose".
    dropout: probability of the empty prompt, for guidance.
    shuffle: shuffle the comma-separated tags behind the first `keep`.  keep: number of tags that stay in front.
    tag_dropout: probability of dropping each of the other tags.
    prefix: text before every prompt that is not empty.  wildcards: replace {red|blue} by one of its texts.
    chunks: read captions up to 1, 2 or 3 chunks of 75 tokens, divided as in sampling: kohya's max_token_length of 75,
    150 and 225.  The rest of a longer caption is cut off.
    encode: train on the autoencoder's moments; each picture is encoded once, with flips also its mirror image, with
    random crops at every step.
    cache: folder that stores moments, and text encoder outputs if the text encoder is frozen, for later runs; "" keeps
    the moments of up to FEW pictures in memory and no text.  Needs crop=center.
    resident: keep all pictures, or their moments, on the device; a batch then sends only their numbers and its words.
    workers: processes that prepare the batches, and the pictures of `resident`; 0 uses threads of this process.
    concept: also give E4T's encoder a picture: the "same" one, or an "other" view of the subject if the source has one.
    validation: a folder of held-out pictures, "#SPLIT" of the same data, or the share of `path` to hold out; see
    Train.validate.
    mask: weigh the loss by the mask file, otherwise by the alpha channel.
    condition: what a ControlNet reads: "canny", "softedge", "scribble", "lines" or "depth" (computed), "files"
    (NAME.condition.png beside the picture), "openpose" (NAME.condition.json), "segmentation" or "mask" (files).
    Settings follow as in "canny:low=50".  data.condition_folder names another folder of such files.
    """

    path: str = ""
    source: Source | None = None
    word: str = ""
    words: tuple[tuple[str, str], ...] = ()
    templates: str = "captions"
    size: int = 0
    buckets: int = 0
    batch: int = 4
    crop: str = "center"
    flip: float = 0.0
    dropout: float = 0.0
    shuffle: bool = False
    keep: int = 0
    tag_dropout: float = 0.0
    prefix: str = ""
    wildcards: bool = False
    chunks: int = 1
    cache: str = ""
    encode: bool = True
    resident: bool = False
    workers: int = 0
    concept: str = ""
    mask: bool = False
    condition: str = ""
    validation: str | float = 0.0

    def __post_init__(self):
        settings.check(
            self, concept=CONCEPTS, size=settings.FROM_0, buckets=settings.FROM_0, batch=settings.FROM_1,
            dropout=settings.TO_1, crop=CROPS, flip=settings.TO_1, keep=settings.FROM_0, tag_dropout=settings.TO_1,
            workers=settings.FROM_0, chunks=lengths.CHUNKS,
        )  # fmt: skip
        if not isinstance(self.validation, str):
            settings.check(self, validation=settings.BELOW_1)
        if self.cache and self.crop != "center":
            raise SettingError("cache", self.cache, f"'' with crop={self.crop!r}, which cuts every picture anew")
        if self.buckets and self.concept and not self.squares:
            raise SettingError("buckets", self.buckets, f"0 with concept={self.concept!r}: encoders look at squares")
        if self.resident and (self.crop != "center" or self.flip or self.mask or self.condition):
            raise SettingError("resident", True, "False unless crop=center, flip=0, mask=False and without a condition")
        _ = self.maker  # raises for an unknown condition

    def looked_up(self) -> tuple[str, Source | None]:
        """Returns ("source", the source of `path`), whose settings are also available as data.NAME."""
        return "source", self.source or sources.matching(self.path)

    @property
    def maker(self) -> conditions.Condition | None:
        """The condition that a ControlNet reads, or None."""
        return conditions.of(self.condition) if self.condition else None

    @property
    def squares(self) -> bool:
        """Whether all pictures are squares, in one size or several."""
        source = self.source or (sources.matching(self.path) if self.path else None)
        return not self.buckets or (source is not None and source.square)


@dataclass(frozen=True)
class Share:
    """The rows of every batch with one source's pictures.

    first: the first of these rows; plan.rows counts them.  weight: their weight in the loss.  plan: their pictures.
    """

    source: Examples
    first: int
    weight: float
    plan: Plan


class Batches:
    """The batches of a run.

    single: the pixels [S S 3] of a source with one picture, otherwise None.
    rows: the rows of the global batch that this process decodes, ascending; all, unless `of` selected some.
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
        self.data, self.size, self.seed = data, size, seed
        self.tokenizers, self.factor, self.maker = dict(sd.tokenizers), sd.factor, data.maker
        self.drawn = self.maker is not None and not self.maker.endings  # a condition computed from the picture
        self.single = to_pixels(source.picture(0, size)) if len(source) == 1 else None
        self.texts: cache.Texts | None = None
        self.classes, others = classes
        self.rows: Sequence[int] = range(data.batch)
        shapes = _divided(source, data, size, sd)
        divided = [(source, shapes), *([] if others is None else [(others, _beside(others, shapes))])]
        self.tables: resident.Tables | None = None
        if data.resident:
            if others is not None:
                raise SettingError(
                    "data.resident", True, "False with class_data.path, whose pictures share the batches"
                )
            self.tables, examples = resident.resident(*divided[0], sd, data)
            kept = [(examples, divided[0][1])]
        else:
            kept = cache.kept(divided, sd, data, bool(data.concept) or self.drawn)
        less = 0 if others is None else self.classes.rows_of(data.batch)
        counts = [(data.batch - less, 1.0), (less, self.classes.weight)]
        self.shares, first = [], 0
        for (examples, shapes), (count, part) in zip(kept, counts, strict=False):
            plan, weight = Plan(shapes, count, seed), part * data.batch / count
            self.shares.append(Share(examples, first, weight, plan))
            first += count

    @property
    def source(self) -> Examples:
        """The pictures of the subject."""
        return self.shares[0].source

    @property
    def plan(self) -> Plan:
        """The plan of the subject's pictures in each batch."""
        return self.shares[0].plan

    @property
    def squares(self) -> bool:
        """Whether all batches have the run's square shape."""
        return self.plan.shapes == [(self.size, self.size)]

    def of(self, rows: Sequence[int]) -> "Batches":
        """Returns the same batches with these rows only, so that a process decodes its own rows."""
        return self._with(rows=rows)

    def _with(self, **changes):
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Returns the batch of a step."""
        return next(self.iterate(step, threads=0))

    def mentions(self, tokens: dict[str, Any]) -> bool:
        """Returns whether one of the source's first MOST prompts has one of these ids {text encoder: [n]}."""
        said = (self.tokenize([caption]) for caption in self.captions())
        return any(np.isin(ids[encoder], tokens[encoder]).any() for ids in said for encoder in tokens)

    def captions(self) -> Iterator[str]:
        """Yields the source's first MOST prompts."""
        generators = ((i, np.random.default_rng((self.seed, i))) for i in range(min(len(self.source), MOST)))
        return (tags.varied(self.source.caption(i, random), self.data, random) for i, random in generators)

    def iterate(self, start: int = 0, threads: int = THREADS) -> Iterator[dict[str, Any]]:
        """Yields the batches of steps start, start + 1, ...; threads and data.workers decode ahead."""
        if threads and any(share.source.remote for share in self.shares):
            threads = max(threads, REMOTE)
        workers, count = self.data.workers if threads else 0, len(self.rows)
        maker = self._with(tables=None, texts=None) if workers else self  # device arrays stay in this process
        found = stream.batched(lambda q: maker._example(maker._position(q)), start * count, count, threads, workers)
        if workers and self.texts is not None:
            found = map(functools.partial(_told, self.texts), found)
        tables = self.tables
        if tables is None:
            return found
        return (tables(self.plan.at(start + n)[0], batch) for n, batch in enumerate(found))

    def _position(self, q):
        """Returns the place in the global stream of the q-th example that this process decodes."""
        step, i = divmod(q, len(self.rows))
        return step * self.data.batch + self.rows[i]

    def fill(self, epochs: float) -> str:
        """Caches the prompts of `epochs` epochs if self.texts is set; returns a summary of the cache."""
        kept = [share.source for share in self.shares if isinstance(share.source, cache.Kept)]
        said = f"{sum(examples.count for examples in kept)} pictures"
        if self.texts is None:
            return f"{said}, no prompts: the text encoder learns, or nothing is kept"
        for position in range(self.plan.batches(epochs) * self.data.batch):
            self.texts(self._ids(self.seen(position)["caption"]))
        return f"{said}, {len(self.texts.store)} prompts"

    def seen(self, position: int) -> dict[str, Any]:
        """Returns the source's example at a place of the global stream, with its "size", "i", "share" and "random"."""
        random = np.random.default_rng((self.seed, position))
        step, row = divmod(position, self.data.batch)
        share = [share for share in self.shares if share.first <= row][-1]
        (height, width), before = self.plan.at(step)
        i = share.plan.shown((height, width), before, row - share.first)
        size = height if height == width else (height, width)
        item = share.source.example(i, size, random)
        dropped = random.random() < self.data.dropout
        caption = "" if dropped else tags.varied(item["caption"], self.data, random)
        return {**item, "caption": caption, "size": size, "i": i, "share": share, "random": random}

    def _example(self, position):
        """Returns the example at a place of the global stream: one row of a batch."""
        item = self.seen(position)
        share, caption = item["share"], item["caption"]
        example = {
            "ids": self._ids(caption),
            "index": np.int32(position % (1 << 31)),
            "weight": np.float32(share.weight),
        }
        if self.texts is not None:
            example["text"] = self.texts(example["ids"])
        if self.classes.identifiers:
            example["class_ids"] = self._ids(self.classes.prompt(caption))
        if kept := item.keys() & {"moments", "row"}:
            example |= {name: item[name] for name in kept}
        else:
            example["pixels"] = to_pixels(item["picture"])
        if self.data.concept:
            example |= self._concept(item)
        if self.data.mask:
            whole = np.ones(np.broadcast_to(item["size"], 2), np.float32)  # class pictures have no mask
            example["mask"] = _shrink(item.get("mask", whole), self.factor)
        if self.maker is not None:
            seen = self.maker.make(item["picture"]) if self.drawn else item["condition"]
            example["control"] = {"hint": seen.astype(np.float32) / 255}
        return example

    def _concept(self, item):
        """Returns the picture of the row's subject for E4T's encoder: {"concept": pixels} or {"other": its row}."""
        share, random, i = item["share"], item["random"], item["i"]
        i = share.source.other(i, random) if self.data.concept == "other" else i
        if isinstance(share.source, cache.Kept) and "row" in share.source.places:
            return {"other": share.source.stored(i)["row"]}
        seen = item if self.data.concept == "same" else share.source.example(i, item["size"], random)
        return {"concept": to_pixels(seen["picture"])}

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Returns {text encoder: ids int32 [B L]} of prompts; [B chunks L] for several chunks."""
        return conditioning.tokens(self.tokenizers, prompts, self.data.chunks)

    def _ids(self, caption):
        return {encoder: ids[0] for encoder, ids in self.tokenize([caption]).items()}


def _told(texts, batch):
    """Returns a batch from another process with the text encoder's outputs, which this process has."""
    rows = [texts({name: ids[i] for name, ids in batch["ids"].items()}) for i in range(len(batch["index"]))]
    return {**batch, "text": {name: np.stack([row[name] for row in rows]) for name in rows[0]}}


def _shrink(mask, factor):
    """Returns the mean of every factor x factor tile of a mask [H W], as [H/factor W/factor 1]."""
    h, w = (side // factor for side in mask.shape)
    return mask.reshape(h, factor, w, factor).mean((1, 3), dtype=np.float32)[..., None]


def _divided(examples, data, size, sd):
    """Returns {shape: numbers of an epoch's pictures}."""
    if not data.buckets:
        return {(size, size): examples.epoch()}
    unit = sd.factor * 2 ** (len(sd.networks["unet"].config.block_out_channels) - 1)
    return buckets.divided(examples, lambda sizes: buckets.assign(sizes, size, unit, data.buckets))


def _beside(others, shapes):
    """Returns {shape: numbers of an epoch's class pictures} for the subject's {shape: numbers}."""
    if len(shapes) == 1:
        return dict.fromkeys(shapes, others.epoch())
    counts = [len(numbers) for numbers in shapes.values()]
    return buckets.divided(others, lambda sizes: buckets.spread(sizes, list(shapes), counts))


def sizes(data: Data, sd: StableDiffusion, source: Examples) -> dict[buckets.Shape, int]:
    """Returns {(height, width) of batches: pictures of that size in an epoch of the source}."""
    return {shape: len(numbers) for shape, numbers in _divided(source, data, side(data, sd), sd).items()}


def side(data: Data, sd: StableDiffusion) -> int:
    """Returns the side of a run's square pictures in pixels: data.size, or the model's.

    Raises SettingError for a size that the autoencoder cannot halve evenly.
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
    """Returns the Batches of a run for a model (its tokenizers, its picture size, its autoencoder for the cache).

    source: the examples of sources.open(data); None opens them.  others: the examples of classes.path, likewise.
    Raises ValueError for a path without pictures, and for sizes that the autoencoder cannot halve evenly.
    """
    source = sources.open(data) if source is None else source
    if others is None and classes.path:
        others = sources.open(classes.data(data))
    numbers, apart = source.chosen(), _apart(data, source, seed)
    if len(apart):
        numbers = np.arange(len(source)) if numbers is None else np.asarray(numbers)
        numbers = numbers[~np.isin(numbers, apart)]
    size = side(data, sd)
    others = None if others is None else _only(others, others.chosen())
    return Batches(data, _only(source, numbers), size, sd, seed, (classes, others))


def held_out(data: Data, sd: StableDiffusion, seed: int) -> Batches | None:
    """Returns the Batches of the held-out pictures, without augmentation; None without any."""
    if not data.validation:
        return None
    plain, size = measured(data), side(data, sd)
    source = sources.open(plain)
    numbers = None if isinstance(data.validation, str) else _apart(data, source, seed)
    return Batches(plain, _only(source, numbers), size, sd, seed)


def measured(data: Data) -> Data:
    """Returns the run's Data for the held-out pictures: no augmentation, no buckets, the path of `validation`."""
    fixed = dict(crop="center", flip=0.0, dropout=0.0, shuffle=False, tag_dropout=0.0)
    plain = replace(data, validation=0.0, buckets=0, **fixed)
    if not isinstance(data.validation, str):
        return plain
    if data.validation.startswith("#"):  # another split of the same files
        return replace(plain, path=splits.beside(data.path, data.validation))
    return replace(plain, path=data.validation, source=None)


def _apart(data, source, seed):
    """Returns the sorted numbers of the pictures held out of the source: data.validation's share, at least one."""
    if not data.validation or isinstance(data.validation, str):
        return np.zeros(0, np.int64)
    numbers = np.arange(len(source)) if (chosen := source.chosen()) is None else np.asarray(chosen)
    if len(numbers) == 1:
        raise SettingError("data.validation", data.validation, "0, or a folder: there is only one picture")
    count = min(max(1, round(data.validation * len(numbers))), len(numbers) - 1)
    order = np.random.default_rng((seed, zlib.crc32(b"validation"))).permutation(len(numbers))
    return np.sort(numbers[order[:count]])


def _only(source, numbers):
    """Returns the source's pictures with these numbers; all of them for None."""
    return source if numbers is None else Only(source, numbers)
