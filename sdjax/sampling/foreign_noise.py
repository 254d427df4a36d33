"""The noise that other programs draw from a seed, so that their seeds give the same pictures.

    noise = start("torch-cpu", seeds=[1, 2], shape=(64, 64, 4))          # [B h w c], a sampler's start
    fresh = steps("torch-cpu", [1, 2], (64, 64, 4), count=plan.draws)    # [n B h w c], its `step_noise`

    jax        JAX's generator, drawn during sampling: `start` and `steps` return None
    torch-cpu  torch.Generator("cpu").manual_seed(seed): diffusers with a generator per picture, A1111's RNG "CPU"
    philox     torch's CUDA generator: A1111's RNG "NV"; also "GPU", up to as many numbers as the GPU has threads

Every picture has its own generator.  Its first draw is the start noise, later draws are the fresh noise of stochastic
samplers.  Draws are channels first, as in PyTorch, and returned channels last.  (k-diffusion's SDE samplers use a
Brownian tree instead, which is not reproduced.)

Shapes: B pictures, h w latent pixels, c latent channels, n draws.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt32

SOURCES = ("jax", "torch-cpu", "philox")
ROOM = 64  # least number of draws that `steps` returns, so that few step counts recompile
Shape = tuple[int, int, int]  # of one picture's noise
f32 = np.float32


def start(source: str, seeds: Sequence[int], shape: Shape) -> Float32[np.ndarray, "B h w c"] | None:
    """Returns standard normal noise [B h w c], float32: the first draw of each seed; None for "jax".

    shape: (h, w, c).  Raises ValueError for an unknown source.
    """
    if source == "jax":
        return None
    return np.stack([_last(draw(source, seed, [_first(shape)])[0]) for seed in seeds])


def steps(
    source: str, seeds: Sequence[int], shape: Shape, count: int, delta: int = 0
) -> Float32[np.ndarray, "n B h w c"] | None:
    """Returns the draws after the first, [n B h w c]; n is ROOM or the next power of two from `count` on.

    Returns None for "jax".  delta: A1111's ENSD; if it is not 0, the draws come from seeds + delta, starting with the
    first.
    Raises ValueError for an unknown source.
    """
    if source == "jax":
        return None
    room = max(ROOM, 1 << max(0, int(count) - 1).bit_length())
    fresh = np.zeros((room, len(seeds), *shape), f32)
    for b, seed in enumerate(seeds):
        drawn = draw(source, seed + delta, [_first(shape)] * (int(count) + (delta == 0)))
        for n, values in enumerate(drawn[delta == 0 :]):
            fresh[n, b] = _last(values)
    return fresh


def draw(source: str, seed: int, shapes: Sequence[tuple[int, ...]]) -> list[Float32[np.ndarray, "..."]]:
    """Returns standard normal arrays of these shapes, drawn one after another from a generator of `seed`.

    seed: any integer; torch-cpu uses its lowest 32 bits, philox 64.  The float32 numbers equal torch's bit for bit
    (torch-cpu, on processors with AVX2) or to a few units of the seventh digit (philox).
    Raises ValueError for a source other than torch-cpu and philox.
    """
    if source not in ("torch-cpu", "philox"):
        raise ValueError(f"noise={source!r}: expected one of {', '.join(SOURCES)}")
    counts = [int(np.prod(shape)) for shape in shapes]
    drawn = (_torch_cpu if source == "torch-cpu" else _philox)(int(seed), counts)
    return [values.reshape(shape) for values, shape in zip(drawn, shapes, strict=True)]


def _first(shape: Shape) -> Shape:
    height, width, channels = shape
    return channels, height, width


def _last(values: Float32[np.ndarray, "c h w"]) -> Float32[np.ndarray, "h w c"]:
    return np.moveaxis(values, 0, -1)


# ---- torch on a CPU: Mersenne Twister, and Box-Muller by Cephes' single-precision functions ----


def _torch_cpu(seed: int, counts: Iterable[int]) -> list[Float32[np.ndarray, " n"]]:
    """Source: PyTorch, ATen/native/cpu/DistributionTemplates.h, normal_fill and normal_distribution."""
    bits = np.random.RandomState(seed & 0xFFFFFFFF)
    words = functools.partial(bits.randint, 0, 1 << 32, dtype=np.uint32)
    drawn, spare = [], None
    for count in counts:
        if count < 16:
            values = np.empty(count, f32)
            for i in range(count):
                spare, values[i] = (None, spare) if spare is not None else _pair(words(4))
        else:
            values = _blocks(words(count)) if count % 16 == 0 else _blocks(np.pad(words(count), (0, -count % 16)))
            values = values[:count]
            if count % 16:  # torch draws the last 16 again
                values[-16:] = _blocks(words(16))
        drawn.append(values)
    return drawn


def _pair(words: UInt32[np.ndarray, " 4"]) -> tuple[float, float]:
    """Returns the two normals of one Box-Muller step in double precision: (the second, kept for later; the first)."""
    high, low = words.astype(np.uint64).reshape(2, 2).T
    u, v = ((high << np.uint64(32) | low) & np.uint64((1 << 53) - 1)) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log1p(-v)), 2 * np.pi * u
    return radius * np.sin(angle), radius * np.cos(angle)


def _blocks(words: UInt32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Returns normals [n] from random words [n], n a multiple of 16; the second 8 of each 16 words give the angles."""
    uniform = (words & 0xFFFFFF).astype(f32) * f32(2**-24)
    u, v = uniform.reshape(-1, 2, 8).swapaxes(0, 1)
    radius = np.sqrt(f32(-2) * _log(1 - u))
    sine, cosine = _sincos(v * f32(2 * np.pi))
    return np.stack([radius * cosine, radius * sine], 1).reshape(-1)


def _fma(a: Any, b: Any, c: Any) -> Float32[np.ndarray, "..."]:
    """Returns a * b + c rounded once to single precision: the product is exact in double."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(f32)


def _horner(coefficients: Sequence[float], x: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    return functools.reduce(lambda y, c: _fma(y, x, f32(c)), coefficients[1:], np.full_like(x, coefficients[0]))


# Source of the constants: Moshier, Cephes, single/logf.c and single/sinf.c.
LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1)
LOG += (2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
LN2 = (-2.12194440e-4, 0.693359375)  # their sum is log 2
COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # their sum is -pi / 4


def _log(x: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Returns log x of single-precision x > 0, with torch's vectorised order of operations and rounding."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < f32(0.5**0.5)
    m = mantissa - 1 + np.where(small, mantissa, f32(0))
    e = (exponent - small).astype(f32)
    square = m * m
    y = _fma(_horner(LOG, m) * m, square, e * f32(LN2[0]))
    return _fma(e, f32(LN2[1]), m + _fma(square, f32(-0.5), y))


def _sincos(x: Float32[np.ndarray, "..."]) -> tuple[Float32[np.ndarray, "..."], Float32[np.ndarray, "..."]]:
    """Returns (sin x, cos x) of single-precision x >= 0, likewise."""
    octant = (x * f32(4 / np.pi)).astype(np.int32) + 1 & ~1
    for part in QUARTER_PI:
        x = _fma(octant.astype(f32), f32(part), x)
    square = x * x
    cosine = _fma(_horner(COSINE, square) * square, square, square * f32(-0.5)) + 1
    sine = _fma(_horner(SINE, square) * square, x, x)
    straight = octant & 2 == 0
    sine, cosine = np.where(straight, sine, cosine), np.where(straight, cosine, sine)
    return np.where(octant & 4, -sine, sine), np.where((octant - 2) & 4, cosine, -cosine)


# ---- torch on a GPU: Philox, and Box-Muller by cuRAND ----


def _philox(seed: int, counts: Iterable[int]) -> list[Float32[np.ndarray, " n"]]:
    """Source: Salmon et al. 2011, "Parallel random numbers"; cuRAND's curand_normal4, with one thread per number.

    The numbers equal torch's if the GPU runs at least as many threads as numbers are drawn at once.  Most GPUs run 2048
    per multiprocessor, which the latents of one picture seldom exceed.
    """
    key = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    drawn = []
    for n, count in enumerate(counts):
        counter = np.zeros((4, count), np.uint32)
        counter[0], counter[2] = n, np.arange(count)
        x, y = philox4x32(counter, key)[:2].astype(f32)
        u = _fma(x, f32(2**-32), f32(2**-33)).astype(np.float64)
        v = _fma(y, f32(2**-31 * np.pi), f32(2**-32 * np.pi)).astype(np.float64)
        drawn.append((np.sqrt(-2 * np.log(u)) * np.sin(v)).astype(f32))
    return drawn


def philox4x32(counter: UInt32[np.ndarray, "4 n"], key: tuple[int, int], rounds: int = 10) -> UInt32[np.ndarray, "4 n"]:
    """Returns random words uint32 [4 n] of counters uint32 [4 n] and a key of two 32-bit numbers."""
    c = list(counter.astype(np.uint64))
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    for i in range(rounds):
        k = [np.uint64((key[j] + i * step) & 0xFFFFFFFF) for j, step in enumerate((0x9E3779B9, 0xBB67AE85))]
        one, two = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [two >> half ^ c[1] ^ k[0], two & low, one >> half ^ c[3] ^ k[1], one & low]
    return np.array(c, np.uint64).astype(np.uint32)
