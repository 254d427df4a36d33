"""Estimates a run's device memory and chooses settings below a limit: fit=auto, 8GB, 12GB, 16GB or 24GB.

    settings = typed(settings)                                     # before the model is loaded
    settings, said = fitted(settings, trained, frozen)             # and after it

A step keeps its data.batch rows, so training gives the same result.  Microbatches, rematerialised activations and, as a
last resort, factored moments save memory.  Frozen weights and computation are bfloat16.

The estimate is the sum of:
* trained weights in float32, the optimizer's numbers and the moving average;
* gradients and a bfloat16 copy of the trained weights, as far as they exist at the same time, and sums of gradients
  with microbatches;
* frozen weights in their own type;
* activations.
It is fitted to the compiler's numbers for Stable Diffusion 1.5 at 512 x 512 (docs/fit_memory.json, with the commands).
Activations scale with the pixels and with the square root of the UNet's number of weights; the latter is our estimate
for other models.  A GB is 2^30 bytes, as in the names of devices.  It describes steps of the UNet's diffusion loss;
checks.alone refuses `fit` for methods with a loss of their own.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from sdjax import trees
from sdjax.models import recompute
from sdjax.runtime import mesh, processes
from sdjax.sampling import memory
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.training.optimizers import KINDS

AUTO, GB = "auto", 1 << 30
SHARE = 0.945  # usable share of the limit; the device itself needs the rest
ROW = {False: 6.0e9, "products": 0.95e9, True: 0.55e9}  # bytes of activations per row, {remat: bytes}
FIXED, PIXELS = 0.3e9, 0.7e9  # bytes of any step, and of a row whose pixels the autoencoder encodes
BESIDE = {False: 2.0, True: 9.5}  # bytes of a weight's gradient and bfloat16 copy, {microbatches: bytes}
UNET, AREA = 860e6, 512 * 512  # weights and pixels of the measured model


def typed(settings: Any) -> Any:
    """Returns the settings with the data types that `fit` sets; unchanged if it is ""."""
    return replace(settings, compute="bfloat16", frozen="bfloat16", remat=True) if settings.fit else settings


def fitted(settings: Any, trained: Any, frozen: StableDiffusion, size: int, pixels: bool = False) -> tuple[Any, str]:
    """Returns (settings below the limit, the choice as a line of text); other arguments: see bytes_of.

    It takes the first candidate that fits, fastest first.  The recipe's optimizer comes first, keeping all activations,
    products, or blocks' inputs (models/recompute.py); then adafactor with the latter two.  Each has as few microbatches
    as possible.
    Raises SettingError if none fits, with the bytes of the smallest candidate, and for "auto" with unknown memory.
    """
    whole, least = limit_of(settings.fit, trained, frozen), math.inf
    limit, of = SHARE * whole, f" of {whole / GB:.1f} GB" if settings.fit == AUTO else ""
    for made in _ways(settings):
        needed = bytes_of(made, trained, frozen, size, pixels)
        if needed <= limit:
            n, rows = made.optim.accumulate, made.data.batch
            said = f"rows in {n} x {rows // n}, {made.optim.kind}, remat={made.remat}, compute and frozen in bfloat16"
            return made, f"fit={settings.fit}: {said}; about {needed / GB:.1f} GB{of}"
        least = min(least, needed)
    raise SettingError("fit", settings.fit, "a larger limit, fewer trained weights or smaller pictures",
                       f"this run needs at least about {least / SHARE / GB:.1f} GB{of}")  # fmt: skip


def limit_of(fit: str, *held: Any) -> float:
    """Returns the bytes of a limit; "auto": the first device's free bytes and those of the arrays in the trees `held`.

    In several processes it is the first one's.  Raises SettingError if the device does not tell its memory.
    """
    if fit != AUTO:
        return GB * int(fit.removesuffix("GB"))
    free = processes.led(memory.available)
    if free is None:
        raise SettingError("fit", fit, "a limit such as 8GB", "this device does not tell its memory")
    return free + sum({id(x): x.nbytes for x in jax.tree.leaves(held) if isinstance(x, jax.Array)}.values())


def _ways(settings):
    """Yields candidate settings, fastest first."""
    rows, devices, own = settings.data.batch, mesh.count(settings.parallel), settings.optim
    parts = [n for n in range(own.accumulate, rows + 1) if rows % (n * devices) == 0]
    kinds = [(own.kind, remat) for remat in recompute.KINDS]
    if own.kind != "adafactor" and not KINDS[own.kind].finds:  # the rate of one that finds it does not suit another
        kinds += [("adafactor", remat) for remat in recompute.KINDS[1:]]
    for kind, remat in kinds:
        for n in parts[:1] if settings.method.whole_batch else parts:
            yield replace(settings, optim=replace(own, kind=kind, accumulate=n), remat=remat)


def aside(step: Any, state: Any, frozen: StableDiffusion, batch: Any) -> StableDiffusion:
    """Returns the frozen model with the weights that a step does not read in host memory."""
    leaves, treedef = jax.tree.flatten(frozen)
    made = jax.make_jaxpr(lambda leaves: step(state, treedef.unflatten(leaves), batch))(leaves).jaxpr
    needed = set(trees.variables(made.outvars))
    for equation in reversed(made.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed.update(trees.variables(equation.invars))
    kept = [x if name in needed else np.asarray(x) for name, x in zip(made.invars, leaves, strict=True)]
    return treedef.unflatten(kept)


def bytes_of(settings: Any, trained: Any, frozen: StableDiffusion, size: int, pixels: bool = False) -> float:
    """Returns an estimate of the bytes that a step needs on one device.

    trained, frozen: from the method's split, or their shapes.  size: side of the pictures.  pixels: whether batches
    hold pixels, which the autoencoder encodes within the step.
    """
    numbers = trees.count(trained)
    floats, parts = 1.0 + KINDS[settings.optim.kind].moments + (settings.ema > 0), settings.optim.accumulate > 1
    beside = BESIDE[parts] if settings.compute == "bfloat16" else 4.0 * (1 + parts)
    unseen = set() if settings.parallel != "single" else {"image_encoder"} if pixels else {"image_encoder", "vae"}
    seen = {name: tree for name, tree in frozen.parts.items() if name not in unseen}
    still = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((seen, frozen.reference)))
    unet = trees.count(frozen.parts["unet"]) + numbers
    rows = settings.data.batch / settings.optim.accumulate / mesh.count(settings.parallel)
    scale = size**2 / AREA * min(1.0, math.sqrt(unet / UNET))
    wide = 1 if settings.compute == "bfloat16" else 2
    activations = wide * rows * scale * (ROW[settings.remat] + PIXELS * pixels)
    return numbers * (4 * floats + beside) + still + FIXED * min(1.0, unet / UNET) + activations
