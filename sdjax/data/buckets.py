"""Aspect-ratio buckets: a few shapes for many aspect ratios, and the plan of their batches.

    shapes, which = assign([(600, 800), (512, 512), ...], size=512, unit=64, most=5)    # [(512, 512), ...], [1, 0, ...]
    plan = Plan({(512, 512): [0, 1, 1, 2]}, rows=4, seed=0)
    plan.at(step)                           # (shape, the number of this bucket's earlier batches)
    plan.picture(step, row)                 # (shape, the picture in a row of the step's batch)

Every shape compiles a program, so there are few.  A picture is scaled down to cover its bucket and cropped; it is never
enlarged.  Class pictures are cut to the shapes of the subject's pictures, so that all rows of a batch have one shape.

A bucket passes over its pictures again and again, each time in another order.  The next pass fills an incomplete batch.
An epoch shuffles the batches that are complete by its end.  Everything is a function of seed and step.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from sdjax.data.sources.source import Examples
from sdjax.settings import SettingError

Shape = tuple[int, int]  # height, width
Assigned = tuple[Sequence[Shape], Int[np.ndarray, " N"]]  # shapes, the index of each picture's shape
MANY, FINE = 4096, 512  # picture sizes before similar ones are grouped; steps of log(h / w) in a group (our choice)
LONGEST = 3.0  # largest ratio of a bucket's longer side to its shorter one (our choice)


def assign(
    sizes: Sequence[Shape] | np.ndarray, size: int, unit: int, most: int
) -> tuple[list[Shape], Int[np.ndarray, " N"]]:
    """Returns (shapes (h, w), the index of each picture's shape) for N pictures of these (height, width).

    There are at most `most` shapes, the largest first, each with a picture.  The sides of a shape are multiples of
    `unit`, and it has at most size^2 pixels.
    Cropping to a shape keeps the share min(r / r', r' / r) of a picture, where r = height / width of the picture and r'
    of the shape.  Shapes are added greedily: each addition maximises the sum of share * h w / size^2 over all pictures.
    Raises SettingError for a picture that is smaller than every shape.
    """
    both = np.asarray(sizes, np.int64) @ [1 << 32, 1]  # one number for height and width: many times faster to sort
    numbers, which, counts = np.unique(both, return_inverse=True, return_counts=True)
    kinds, shapes = np.stack([numbers >> 32, numbers & 0xFFFFFFFF], 1), np.array(_shapes(size, unit))
    if len(kinds) > MANY:
        first, alike = _alike(kinds, unit, shapes.max())
        kinds, which, counts = kinds[first], alike[which], np.bincount(alike, counts)
    fits = (kinds[:, None] >= shapes[None]).all(-1)
    ratios = np.log(kinds[:, 0] / kinds[:, 1])[:, None] - np.log(shapes[:, 0] / shapes[:, 1])[None]
    value = np.where(fits, np.exp(-np.abs(ratios)) * (shapes.prod(1) / size**2)[None], -float(len(sizes)))
    chosen, best = [], np.full(len(kinds), -float(len(sizes)))
    for _ in range(most):
        gain = (counts[:, None] * np.maximum(value - best[:, None], 0)).sum(0)
        if gain.max() <= 1e-9:
            break
        chosen.append(int(gain.argmax()))
        best = np.maximum(best, value[:, chosen[-1]])
    if (best < 0).any():
        height, width = kinds[best < 0][0]
        why = f"a picture of {width} x {height} pixels is smaller than every bucket, and none is scaled up"
        raise SettingError("data.buckets", most, "more of them, 0 for squares, or larger pictures", why)
    used, places = np.unique(np.array(chosen)[value[:, chosen].argmax(1)], return_inverse=True)
    return [(int(shapes[k, 0]), int(shapes[k, 1])) for k in used], places.ravel()[which]


def divided(examples: Examples, assigned: Callable[[np.ndarray], Assigned]) -> dict[Shape, np.ndarray]:
    """Returns {shape: numbers of an epoch's pictures}; assigned: the result for the sizes [N 2] of N pictures."""
    epoch = np.asarray(examples.epoch())
    shown = np.unique(epoch)
    shapes, which = assigned(examples.shapes()[shown])
    place = which[np.searchsorted(shown, epoch)]
    return {shape: epoch[place == k] for k, shape in enumerate(shapes)}


def spread(sizes: Sequence[Shape] | np.ndarray, shapes: Sequence[Shape], counts: Sequence[int]) -> Assigned:
    """Returns (shapes, the index of each picture's shape) for N pictures of these (height, width).

    The shapes share the pictures in proportion to `counts`, at least one each; the tallest shape gets the tallest
    pictures.  Small pictures are enlarged.
    Raises SettingError for fewer pictures than shapes.
    """
    many = len(shapes)
    if len(sizes) < many:
        wanted = f"at most {len(sizes)}, the number of class pictures: each shape needs one"
        raise SettingError("data.buckets", many, wanted)
    tall = [np.argsort([h / w for h, w in of], kind="stable") for of in (np.asarray(sizes).tolist(), shapes)]
    ends = np.round(np.cumsum(np.asarray(counts)[tall[1]]) / np.sum(counts) * len(sizes)).astype(np.int64)
    least = np.arange(1, many + 1)
    ends = np.maximum.accumulate(np.clip(ends - least, 0, len(sizes) - many)) + least
    which = np.empty(len(sizes), np.int64)
    which[tall[0]] = np.repeat(tall[1], np.diff(ends, prepend=0))
    return shapes, which


def _alike(kinds, unit, longest):
    """Returns (the index of the first size in each group, the group of each size).

    Sizes of one group cover the same shapes and agree in log(h / w) to 1 / FINE.  unit: the shapes' sides are multiples
    of it.  longest: their longest side.
    """
    height, width = np.minimum(kinds, longest).T // unit
    ratio = np.round(np.log(kinds[:, 0] / kinds[:, 1]) * FINE).astype(np.int64)
    _, first, group = np.unique(
        (height * (longest + 1) + width) * (1 << 32) + ratio, return_index=True, return_inverse=True
    )
    return first, group


def _shapes(size, unit):
    """Returns all (h, w) that a bucket may have, most pixels first."""
    sides = range(unit, int(size * LONGEST**0.5) + unit, unit)
    found = [(h, w) for h in sides for w in sides if h * w <= size**2 and max(h, w) <= LONGEST * min(h, w)]
    return sorted(found, key=lambda shape: (-shape[0] * shape[1], shape))


class Plan:
    """The pictures of each batch.

    buckets: {shape: numbers of its pictures, repeated as in an epoch}.  rows: rows of a batch with these pictures.
    """

    def __init__(self, buckets: Mapping[Shape, Sequence[int] | np.ndarray], rows: int, seed: int) -> None:
        import grain

        self.buckets, self.rows, self.seed = dict(buckets), rows, seed
        self.shapes = list(self.buckets)
        self.counts = [len(numbers) for numbers in self.buckets.values()]
        seeds = [seed if len(self.shapes) == 1 else zlib.crc32(f"{seed} {shape}".encode()) for shape in self.shapes]
        self.orders = [
            grain.MapDataset.range(count).seed(own).shuffle().repeat()
            for count, own in zip(self.counts, seeds, strict=True)
        ]
        self._epoch = functools.lru_cache(4)(self._mixed)

    def __reduce__(self) -> tuple[type, tuple]:
        """Pickles the arguments only: another process builds the plan again."""
        return Plan, (self.buckets, self.rows, self.seed)

    def about(self) -> str:
        """Returns a summary of the buckets: "512 x 512 (12), 576 x 448 (3)", width x height and pictures per epoch."""
        return ", ".join(f"{w} x {h} ({len(numbers)})" for (h, w), numbers in self.buckets.items())

    def batches(self, epochs: float) -> int:
        """Returns the number of batches in `epochs` epochs; pictures of the next epoch fill up the last batch."""
        if len(self.shapes) == 1:
            return -int(-epochs * self.counts[0] // self.rows)
        whole = int(epochs)
        part = self._before(whole + 1) - self._before(whole)
        return self._before(whole) + -int(-(epochs - whole) * part // 1)

    def at(self, step: int) -> tuple[Shape, int]:
        """Returns (shape of a step's batch, the number of earlier batches of that shape)."""
        if len(self.shapes) == 1:
            return self.shapes[0], step
        epoch = step * self.rows // sum(self.counts)  # a lower bound: _before(epoch) <= step
        while self._before(epoch + 1) <= step:
            epoch += 1
        which, before = self._epoch(epoch)
        place = step - self._before(epoch)
        return self.shapes[which[place]], int(before[place])

    def picture(self, step: int, row: int) -> tuple[Shape, int]:
        """Returns (shape, number of the picture) for a row of a step's batch."""
        shape, before = self.at(step)
        return shape, self.shown(shape, before, row)

    def shown(self, shape: Shape, before: int, row: int) -> int:
        """Returns the number of the picture in a row of a shape's batch; before: earlier batches of that shape."""
        order: Any = self.orders[self.shapes.index(shape)]
        return int(self.buckets[shape][order[before * self.rows + row]])

    def _before(self, epoch):
        """Returns the number of batches in the epochs before this one."""
        return sum(epoch * count // self.rows for count in self.counts)

    def _mixed(self, epoch):
        """Returns two arrays for an epoch's batches in order: index of the shape, earlier batches of that shape."""
        starts = [epoch * count // self.rows for count in self.counts]
        ends = [(epoch + 1) * count // self.rows for count in self.counts]
        before = np.concatenate([np.arange(*span) for span in zip(starts, ends, strict=True)])
        which = np.repeat(np.arange(len(self.shapes)), np.subtract(ends, starts))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(before))
        return which[order], before[order]
