"""Checks whether a picture fits into memory before sampling starts.

    check(sd, (h, w), rows)        # ValueError with the largest size that would fit

Shapes: h w latent pixels.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from sdjax.diffusion.wrappers import ControlNet
from sdjax.models.kernels import attention, attention_plain
from sdjax.runtime import room
from sdjax.sampling.tiles import AT_ONCE
from sdjax.stable_diffusion import StableDiffusion

# Numbers that a UNet call keeps per row, latent pixel and channel of the finest map: 27 for Stable Diffusion 1.5 with
# 2 rows of 64 x 64, by XLA's own count on a CPU (283 MB; 21 November 2026, benchmarks/sampling_memory.py).
KEPT = 27
CONTROLLED = 9  # likewise per ControlNet, our estimate: its residuals, twice during the sum, and its picture
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
DECODED = 3000  # bytes per pixel that a full-size decoder keeps (tiles.py)


def available() -> int | None:
    """Returns the free bytes of the first device; on a CPU the bytes that this process may still use; None if unknown.

    On a CPU this is the minimum of the machine's free memory and the memory left in the process's control groups.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    lines = _lines(PROC / "meminfo")
    machine = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([*machine, *_left_by_groups()], default=None)


def _left_by_groups():
    """Yields limit - use in bytes for each control group of this process, from its own up to the root.

    Cached files that the kernel reclaims first do not count as use.  Source: Linux, admin-guide/cgroup-v2.rst and
    cgroup-v1/memory.rst.
    """
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, own = line.split(":", 2)
        if not controllers:
            root, most, used, cached = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, most, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = root / own.lstrip("/")
        for folder in (group, *group.parents)[: len(group.parts) - len(root.parts) + 1]:
            numbers = [_lines(folder / name) for name in (most, used)]
            if all(numbers) and numbers[0][0].isdigit():  # "max" means no limit
                back = [
                    int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith(f"{cached} ")
                ]
                yield max(0, int(numbers[0][0]) - int(numbers[1][0]) + sum(back))


def _lines(path):
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def needed(sd: StableDiffusion, sides: Sequence[int], rows: int, controls: int = 0) -> int:
    """Returns an estimate of the bytes for sampling, without the weights: latents of sides (h, w), `rows` at once.

    rows: rows of a UNet call: two per picture with guidance, and one more for each further text of AND.
    controls: number of ControlNets in addition to the model's own wrappers.
    It is the larger of the UNet's and the decoder's needs, plus the pictures.
    """
    pixels = rows * sides[0] * sides[1] * sd.factor**2
    decoder = DECODED * min(pixels, AT_ONCE) * sd.networks["vae"].config.block_out_channels[0] // 128
    return max(unet(sd, sides, rows, controls), decoder) + 12 * pixels


def unet(sd: StableDiffusion, sides: Sequence[int], rows: int, controls: int = 0) -> int:
    """Returns an estimate of the bytes for one call of the UNet and its ControlNets, without the weights.

    controls: see needed.
    """
    controls += sum(isinstance(one, ControlNet) for one in sd.wrappers)
    config, dtype, length = sd.networks["unet"].config, jnp.dtype(sd.networks["unet"].dtype), sides[0] * sides[1]
    width, heads = config.block_out_channels[0], max(config.levels("attention_head_dim"))
    kept = (KEPT + CONTROLLED * controls) * dtype.itemsize
    return rows * length * width * kept + _scores(jax.ShapeDtypeStruct((rows, length, heads, width // heads), dtype))


def _scores(q):
    """Returns the bytes of scores that self-attention of q [B N heads d] holds at once on the first device."""
    platform = jax.local_devices()[0].platform
    whole = attention.way("cuda" if platform == "gpu" else platform, q, q) is attention_plain.attend
    return 4 * math.prod(q.shape[:3]) * q.shape[1] if whole else 0


def check(sd: StableDiffusion, sides: Sequence[int], rows: int, limit: int | None = None, controls: int = 0) -> None:
    """Raises ValueError, with the largest size that fits, if sampling latents of sides (h, w) would exceed the memory.

    limit: bytes; None for the memory that is free now.
    """
    limit = available() if limit is None else limit
    if limit is None or needed(sd, sides, rows, controls) <= limit:
        return
    most = max(sides)
    low, high = 0, most  # the longer side: `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = needed(sd, [side * middle // most for side in sides], rows, controls) <= limit
        low, high = (middle, high) if fits else (low, middle)
    wanted, largest = (tuple(side * size // most * sd.factor for side in sides) for size in (most, low))
    raise ValueError(
        f"size={wanted}: needs about {needed(sd, sides, rows, controls) / 1e9:.1f} GB, {limit / 1e9:.1f} GB are free; "
        f"the largest that fits is {largest}, or make fewer at once"
    )


@contextlib.contextmanager
def told(size: Sequence[int], count: int) -> Iterator[None]:
    """Turns a device's out-of-memory error into a ValueError of one line; size: pixels (height, width)."""
    with room.memory(f"size={size}: out of memory with {count} at once; make it smaller, or fewer"):
        yield
