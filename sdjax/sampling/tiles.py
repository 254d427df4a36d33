"""Runs the autoencoder on pictures of any size, in tiles if a whole picture exceeds memory.

    pixels = decode(sd, z)                          # [B H W 3], in tiles from AT_ONCE pixels on
    mixed = over(apply, x, tile=64, overlap=16)     # any function of maps that changes their size by one factor

Tiles overlap and blend.  Two layers depend on the whole picture: attention, which runs on the whole coarsest map, and
norms.  The statistics of the norms are measured over all tiles and shared.  Each norm changes the inputs of the next
one, so the measurement repeats until it has SETTLED.  A tile then equals the whole picture's result, up to that error
and the influence of content beyond the overlap.

Shapes: B batch, H W pixels, h w latent pixels, c latent channels, D channels.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from sdjax.models import hooks
from sdjax.models.kernels.convolution_plain import Pads
from sdjax.models.layers import GroupNorm
from sdjax.runtime import replicas
from sdjax.sampling import seamless
from sdjax.stable_diffusion import StableDiffusion

AT_ONCE = 1 << 20  # most pixels without tiles; a full-size decoder needs about 3 GB for them
TILE = 1024  # pixels along a side
OVERLAP = 16  # latent pixels that neighbours share, at most half a tile
SETTLED = 0.02  # largest change of a mean, in standard deviations, and relative change of a variance
# Most passes.  Errors of 1, 2, 4, 6, 8, 12 passes, of 255: 1.0, 0.5, 1.2, 0.6, 0.2, 0.1 (pocket, 16 tiles of 64).
PASSES = 12
Moments = dict[str, tuple[np.ndarray, np.ndarray]]  # mean and variance [B groups] of each norm
Spot = tuple[slice, slice]  # rows and columns


def decode(
    sd: StableDiffusion, z: Float[Array, "B h w c"], tile: int | None = None
) -> Float32[Array | np.ndarray, "B H W 3"]:
    """Returns pixels float32 [B H W 3], about [-1, 1], from scaled latents [B h w c].

    tile: side of a tile in pixels; None decodes the whole picture, or tiles of TILE above AT_ONCE pixels.
    """
    if tile is None and _fits(z, sd.factor**2):
        return _rows(lambda part: _decode(sd, part), z, sd.factor**2)
    plain, wraps = seamless.split(sd)
    if wraps:
        around = _around(OVERLAP, z)
        return _inner(decode(plain, seamless.wrapped(z, around), tile or TILE), around, sd.factor)
    side = (tile or TILE) // sd.factor
    coarse = jax.lax.map(lambda row: _stage(sd, row[None], "decode", "coarse")[0], z / sd.scaling)
    return _shared(sd, coarse, "decode", side, min(OVERLAP, side // 2), 1, sd.factor)


@contextlib.contextmanager
def ahead(sd: StableDiffusion, rows: int, shape: Sequence[int]) -> Iterator[None]:
    """Compiles `decode` for `rows` latents of shape (h, w, c) in a thread, while the block runs.

    It does nothing on a CPU, whose compiler already uses all cores, for tiles, and for a model on several devices.
    """
    height, width, _ = shape
    z = jax.ShapeDtypeStruct((min(rows, _at_once(height, width, sd.factor**2)), *shape), jnp.float32)
    devices = max(map(replicas.count, jax.tree.leaves(sd.parts["vae"])))
    if _compiled_by_all_cores() or devices > 1 or not _fits(z, sd.factor**2):
        yield
        return
    with ThreadPoolExecutor(1) as aside:
        aside.submit(lambda: _decode.lower(sd.bare, z).compile())  # decode raises its errors
        yield


def _compiled_by_all_cores() -> bool:
    return jax.local_devices()[0].platform == "cpu"


def moments(sd: StableDiffusion, pixels: Float[Array, "B H W 3"], tile: int | None = None) -> Float[Array, "B h w 2*c"]:
    """Returns the latents' mean and log variance [B h w 2c] of pixels [B H W 3] in [-1, 1].  tile: as in decode."""
    if tile is None and _fits(pixels, 1):
        return _rows(lambda part: _moments(sd, part), pixels, 1)
    plain, wraps = seamless.split(sd)
    if wraps:
        around = _around(OVERLAP, pixels[:, :: sd.factor, :: sd.factor])
        wide = seamless.wrapped(pixels, tuple((first * sd.factor, last * sd.factor) for first, last in around))
        return _inner(moments(plain, wide, tile or TILE), around, 1)
    side = (tile or TILE) // sd.factor
    overlap = min(OVERLAP, side // 2)
    fine = _shared(sd, pixels, "encode", side * sd.factor, overlap * sd.factor, sd.factor, 1)
    return jnp.concatenate(_stage(sd, jnp.asarray(fine), "encode", "coarse"), axis=-1)


def _around(most: int, x: Float[Array, "B h w D"]) -> Pads:
    """Returns the latent pixels that tiles of a seamless picture see beyond each edge: `most`, or the whole side."""
    high, wide = (min(most, side) for side in x.shape[1:3])
    return (high, high), (wide, wide)


def _inner(x: Any, around: Pads, factor: int) -> Any:
    """Returns x [B h w D] without `around` times `factor` positions at the edges."""
    (top, bottom), (left, right) = ((first * factor, last * factor) for first, last in around)
    return x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]


def _fits(x: Float[Array, "B h w D"] | jax.ShapeDtypeStruct, area: int) -> bool:
    return x.shape[1] * x.shape[2] * area <= AT_ONCE


def _at_once(height: int, width: int, area: int) -> int:
    """Returns the number of rows of a map that fit on a device."""
    return max(1, AT_ONCE // (height * width * area))


def _rows(apply: Callable[[Array], Array], x: Float[Array, "B h w D"], area: int) -> Float[Array, "B h w D"]:
    """Returns apply(x), with as many rows at once as fit on each device."""
    rows = _at_once(x.shape[1], x.shape[2], area) * replicas.count(x)
    if len(x) <= rows:
        return apply(x)
    return jnp.concatenate([apply(x[i : i + rows]) for i in range(0, len(x), rows)])


@jax.jit
def _decode(sd: StableDiffusion, z: Float[Array, "B h w c"]) -> Float32[Array, "B H W 3"]:
    return sd.decode(z)


@jax.jit
def _moments(sd: StableDiffusion, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2*c"]:
    return sd.moments(pixels)


@functools.partial(jax.jit, static_argnames=("method", "only"))
def _stage(sd: StableDiffusion, x: Float[Array, "B h w D"], method: str, only: str) -> Any:
    return sd.call("vae", x, method=method, only=only)


# ---- tiles with the whole's statistics -----------------------------------------------------------


def _shared(
    sd: StableDiffusion, x: Float[Array, "B h w D"], method: str, tile: int, overlap: int, unit: int, finest: int
) -> Float32[np.ndarray, "B H W C"]:
    """Returns the fine stage of the autoencoder on maps x [B h w D], in tiles that share the norms' statistics.

    finest: positions of the stage's finest map per position of x, along a side.
    """
    spots = list(_spots(x.shape[1:3], tile, overlap, unit))
    shares = _shares(x.shape[1:3], spots, overlap, finest)
    known = None
    for _ in range(PASSES):
        parts = [_measure(sd, _cut(x, spot), share, known, method) for spot, share in zip(spots, shares, strict=True)]
        before, known = known, _merge(jax.tree.map(np.asarray, parts))
        if before is not None and _change(before, known) <= SETTLED:
            break
    return over(lambda part: _apply(sd, part, known, method), x, tile, overlap, unit)


@functools.partial(jax.jit, static_argnames="method")
def _measure(
    sd: StableDiffusion,
    x: Float[Array, "B h w D"],
    share: Float32[np.ndarray, "h w"],
    known: Moments | None,
    method: str,
) -> dict[str, tuple[Array, Array, Array]]:
    watch = _Norms(known, share)
    hooks.apply("vae", sd.networks["vae"], sd.parts["vae"], (*sd.hooks, watch), x, method=method, only="fine")
    return watch.measured


@functools.partial(jax.jit, static_argnames="method")
def _apply(
    sd: StableDiffusion, x: Float[Array, "B h w D"], known: Moments | None, method: str
) -> Float[Array, "B H W C"]:
    watch = _Norms(known)
    return hooks.apply("vae", sd.networks["vae"], sd.parts["vae"], (*sd.hooks, watch), x, method=method, only="fine")


class _Norms:
    """A hook that measures the norms' inputs, and gives norms known statistics.

    share: [H W], the weight of each position.  known: {name: (mean, variance) [B groups]}.
    """

    def __init__(self, known: Moments | None, share: Float32[np.ndarray, "h w"] | None = None):
        self.known, self.share, self.measured = known, share, {}

    def intercept(self, part, layer, args, kwargs, at, cond):
        if not isinstance(at.module, GroupNorm):
            return layer(*args, **kwargs)
        name = "/".join(at.module.path)
        if self.share is not None:
            self.measured[name] = _weighted(args[0].astype(jnp.float32), self.share, at.module.groups)
        return layer(*args, moments=self.known[name]) if self.known is not None else layer(*args)


def _weighted(
    x: Float32[Array, "B h w D"], share: Float32[np.ndarray, "H W"], groups: int
) -> tuple[Array, Array, Array]:
    """Returns (weight, mean [B groups], variance [B groups]) of x [B h w D].

    share: weights of positions, finer than x by a whole number.
    """
    step = share.shape[0] // x.shape[1]
    share = share.reshape(x.shape[1], step, x.shape[2], step).mean((1, 3))[None, ..., None, None]  # [1 h w 1 1]
    x = x.reshape(*x.shape[:3], groups, -1)
    weight = share.sum() * x.shape[-1]
    mean = (share * x).sum((1, 2, 4), keepdims=True) / weight
    variance = (share * jnp.square(x - mean)).sum((1, 2, 4)) / weight
    return weight / x.shape[-1] / (x.shape[1] * x.shape[2]), mean[:, 0, 0, :, 0], variance


def _merge(parts: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]) -> Moments:
    """Returns {name: (mean, variance)} over all tiles, from the statistics of each tile.  Source: Chan et al. 1979."""

    def merged(name: str) -> tuple[np.ndarray, np.ndarray]:
        weight, mean, variance = (np.stack([part[name][i] for part in parts]).astype(np.float64) for i in range(3))
        weight = (weight / weight.sum())[:, None, None]
        total = (weight * mean).sum(0)
        spread = (weight * (variance + (mean - total[None]) ** 2)).sum(0)
        return total.astype(np.float32), spread.astype(np.float32)

    return {name: merged(name) for name in parts[0]}


def _change(before: Moments, after: Moments) -> float:
    """Returns the largest change of {name: (mean, variance)}: in standard deviations, or relative to the variance."""

    def largest(name: str) -> float:
        (mean, variance), (new_mean, new_variance) = before[name], after[name]
        unit = np.maximum(variance, 1e-12)
        return max(np.max(np.abs(new_mean - mean) / np.sqrt(unit)), np.max(np.abs(new_variance - variance) / unit))

    return max(map(largest, before))


# ---- tiles ---------------------------------------------------------------------------------------


def over(
    apply: Callable[[Array], Array | np.ndarray], x: Float[Array, "B h w D"], tile: int, overlap: int, unit: int = 1
) -> Float32[np.ndarray, "B H W C"]:
    """Returns apply(x) [B h' w' C] from tiles that blend into each other; on the host, float32.

    x: [B h w D].  apply: takes [B tile tile D], or less if x is smaller, and scales maps by one factor.
    tile, overlap: in positions of x, multiples of `unit`; apply may shrink `unit` positions to one.
    """
    spots = _spots(x.shape[1:3], tile, overlap, unit)
    return _joined(((spot, apply(_cut(x, spot))) for spot in spots), x.shape[1:3], overlap)


def _joined(
    tiles: Iterable[tuple[Spot, Array | np.ndarray]], sides: Sequence[int], overlap: int
) -> Float32[np.ndarray, "B H W C"]:
    """Returns the map of (spot, tile [B h w D]) pairs that blend into each other."""
    total = weights = np.zeros(0)  # until the first tile shows the factor
    for spot, made in tiles:
        factor = made.shape[1] / (spot[0].stop - spot[0].start)
        if not total.size:
            whole = [round(side * factor) for side in sides]
            total, weights = (
                np.zeros((len(made), *whole, made.shape[-1]), np.float32),
                np.zeros((*whole, 1), np.float32),
            )
        window = _window(made.shape[1:3], overlap * factor)[..., None]
        place = tuple(slice(round(part.start * factor), round(part.stop * factor)) for part in spot)
        total[:, *place] += window[None] * np.asarray(made, np.float32)
        weights[place] += window
    return total / weights[None]


def _spots(sides: Sequence[int], tile: int, overlap: int, unit: int) -> Iterator[Spot]:
    """Yields the tiles as pairs of slices, evenly spread; neighbours share at least `overlap` positions."""
    rows, columns = (_starts(side, min(tile, side), overlap, unit) for side in sides)
    for top in rows:
        for left in columns:
            yield slice(top, top + min(tile, sides[0])), slice(left, left + min(tile, sides[1]))


def _starts(length: int, tile: int, overlap: int, unit: int) -> list[int]:
    count = 1 if tile >= length else -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / max(count - 1, 1) / unit) * unit for i in range(count)]


def _cut(x: Float[Array, "B H W D"], spot: Spot) -> Float[Array, "B h w D"]:
    return x[:, *spot]


def _window(size: Sequence[int], overlap: float) -> Float32[np.ndarray, "h w"]:
    """Returns the weight of each position of a tile [h w]: 1, falling towards its edges in the middle of the overlap.

    Positions further out, near the missing surroundings, have a tiny weight that matters only without another tile.
    """
    inside = [np.minimum(np.arange(n), np.arange(n)[::-1]) + 0.5 for n in size]
    rows, columns = (((d - overlap / 4) / max(overlap / 2, 1)).clip(1e-4, 1) for d in inside)
    return (rows[:, None] * columns[None]).astype(np.float32)


def _shares(sides: Sequence[int], spots: Sequence[Spot], overlap: int, finest: int) -> list[Float32[np.ndarray, "h w"]]:
    """Returns each tile's share of its positions, [h w] * finest; over all tiles the shares add up to 1."""
    total = np.zeros([side * finest for side in sides], np.float32)
    places = [tuple(slice(part.start * finest, part.stop * finest) for part in spot) for spot in spots]
    for place in places:
        total[place] += _window(total[place].shape, overlap * finest)
    return [_window(total[place].shape, overlap * finest) / total[place] for place in places]
