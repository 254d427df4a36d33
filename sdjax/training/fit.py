"""What a run needs of a device's memory, and the settings that keep it below a limit: fit=8GB, 12GB, 16GB or 24GB.

    settings = typed(settings)                                     # before the model is loaded
    settings, said = fitted(settings, trained, frozen)             # and after it

The rows of a step stay those of data.batch, so what is learned stays the same: microbatches, activations computed a
second time and, where nothing else does, factored moments make room.  Weights that do not train and computation are
bfloat16.

The account: weights that train and their gradients in float32, the optimizer's numbers, the moving average, a bfloat16
copy for computation, one more gradient with microbatches, frozen weights as they are, and activations.  Those are fitted
to what the compiler says of Stable Diffusion 1.5 at 512 x 512 (docs/fit_memory.json, with the commands) and go with the
pixels and with the root of the UNet's weights, which is our estimate for other models.  A GB is 2^30 bytes, as devices
are sold.
"""

import math
from dataclasses import replace
from typing import Any

import jax

from sdjax import trees
from sdjax.runtime import mesh
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

GB = 1 << 30
SHARE = 0.98  # of the limit; the rest is the device's own
ROW = {False: 5.2e9, True: 0.75e9}  # bytes of activations of a row, {remat: bytes}
FIXED, PIXELS = 0.5e9, 0.7e9  # bytes of any step, and of a row whose pixels the autoencoder encodes
UNET, AREA = 860e6, 512 * 512  # what they were measured with
MOMENTS = {  # numbers that an optimizer keeps for each that trains
    "adamw": 2, "muon": 2, "adafactor": 0.01, "sgd": 0, "lion": 1, "prodigy": 4, "schedule_free": 2,
}  # fmt: skip


def typed(settings: Any) -> Any:
    """Returns the settings with the types that `fit` sets, as they are where it is ""."""
    return replace(settings, compute="bfloat16", frozen="bfloat16", remat=True) if settings.fit else settings


def fitted(settings: Any, trained: Any, frozen: StableDiffusion, data: Any) -> tuple[Any, str]:
    """Returns (settings that need at most the limit, what was chosen in words).

    trained, frozen, data: what `begin` gave.  The first of these that fits, fastest first: the recipe's optimizer without and with activations computed a
    second time, then adafactor so; each with as few microbatches as will do.
    On several devices each has its part of the rows, and all of the weights.
    Raises SettingError where nothing does, saying what the smallest would need.
    """
    limit, rows = GB * int(settings.fit.removesuffix("GB")), settings.data.batch
    pixels = "pixels" in data[0]
    devices = mesh.count(settings.parallel)
    parts = [n for n in range(1, rows + 1) if rows % (n * devices) == 0 and (n == 1 or not settings.method.whole_batch)]
    parts = [n for n in parts if n >= settings.optim.accumulate]
    ways = [(settings.optim.kind, False), (settings.optim.kind, True), ("adafactor", True)]
    least = math.inf
    for kind, remat in ways:
        for n in parts:
            optim = replace(settings.optim, kind=kind, accumulate=n)
            if kind == "adafactor" and settings.optim.kind == "prodigy":
                continue  # its rate is no rate for another
            made = replace(settings, optim=optim, remat=remat)
            needed = bytes_of(made, trained, frozen, data.size, pixels)
            least = min(least, needed)
            if needed <= SHARE * limit:
                said = (
                    f"fit={settings.fit}: {n} microbatch{'es' * (n > 1)} of {rows // n} rows, {kind}, compute=bfloat16,"
                )
                return made, f"{said} frozen=bfloat16, remat={remat}; about {needed / GB:.1f} GB"
    raise SettingError("fit", settings.fit, "a larger one, less that trains, or smaller pictures",
                       f"the least that this run needs is about {least / SHARE / GB:.1f} GB")  # fmt: skip


def bytes_of(settings: Any, trained: Any, frozen: StableDiffusion, size: int, pixels: bool = False) -> float:
    """Returns about how many bytes a step of these settings needs on one device.

    trained, frozen: of the method's split, or their shapes.  size: a side of the pictures.  pixels: whether batches hold
    pixels, which the autoencoder encodes within the step.
    """
    numbers = trees.count(trained)
    floats = 2.0 + MOMENTS[settings.optim.kind] + (settings.optim.accumulate > 1) + (settings.ema > 0)
    copy = 2 if settings.compute == "bfloat16" else 0
    still = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    unet = trees.count(frozen.parts["unet"]) + trees.count(trained)
    rows = settings.data.batch / settings.optim.accumulate / mesh.count(settings.parallel)
    scale = size**2 / AREA * min(1.0, math.sqrt(unet / UNET))
    wide = 1 if settings.compute == "bfloat16" else 2
    activations = wide * rows * scale * (ROW[settings.remat] + PIXELS * pixels)
    return numbers * (4 * floats + copy) + still + FIXED * min(1.0, unet / UNET) + activations
