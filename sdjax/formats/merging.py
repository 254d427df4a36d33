"""Sums of models: weighted, A (1 - w) + B w, and add difference, A + (B - C) w.

    sd = merged(a, b, 0.3)                       # 0.7 a + 0.3 b
    sd = merged(inpainting, style, 1.0, base)    # the style's difference from its base, on an inpainting model

Source: AUTOMATIC1111's stable-diffusion-webui 1.10, modules/extras.py (checkpoint merger), for formulas and for the
channels that only an inpainting model has.
"""

import math

import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

WIDENED = "conv_in.kernel"  # of a UNet with further input channels, which the other models lack


def merged(a: StableDiffusion, b: StableDiffusion, weight: float, c: StableDiffusion | None = None) -> StableDiffusion:
    """Returns a with the sum of the weights of all parts that the models share, computed in float32.

    Without c it is a (1 - weight) + b weight, otherwise a + (b - c) weight.  Settings, words, and the types of the
    weights are a's.  Of a UNet with more input channels than the others, the first ones change.
    Raises ValueError for models of other shapes or with an encoder of their own, SettingError for an infinite weight.
    """
    if not math.isfinite(weight):
        raise SettingError("weight", weight, "a number")
    others = [b] if c is None else [b, c]
    if any(sd.hooks or sd.conditioners for sd in (a, *others)):
        raise ValueError("a model that computes with more than weights cannot be merged; convert it first")
    shared = [part for part in a.parts if all(part in sd.parts for sd in others)]
    return a.with_parts(**{part: _merged(part, a, others, weight) for part in shared})


def _merged(part, a, others, weight):
    """Returns the merged weights of a part."""
    first, *rest = (trees.flatten(sd.parts[part]) for sd in (a, *others))
    odd = [name for held in rest for name in first.keys() ^ held.keys()]
    odd += [name for held in rest for name in first.keys() & held.keys() if not _fits(name, first[name], held[name])]
    if odd:
        raise ValueError(f"models of other shapes cannot be merged; in {part} differ {trees.listing(sorted(set(odd)))}")
    made = {name: _sum(x, [held[name] for held in rest], weight) for name, x in first.items()}
    return trees.unflatten(made, a.parts[part])


def _fits(name, x, other):
    wider = name == WIDENED and x.shape[2] > other.shape[2]
    return x.shape == (other.shape if not wider else (*other.shape[:2], x.shape[2], other.shape[3]))


def _sum(x, others, weight):
    """Returns the sum for one weight, of x's type; others: [B] or [B, C], perhaps with fewer input channels."""
    a, b, *rest = (np.asarray(one, np.float32) for one in (x, *others))
    weight = np.float32(weight)
    if a.shape != b.shape:
        a = a[:, :, : b.shape[2]]
    made = a + (b - rest[0]) * weight if rest else a * (1 - weight) + b * weight
    if x.shape != made.shape:
        made = np.concatenate([made, np.asarray(x, np.float32)[:, :, made.shape[2] :]], axis=2)
    return jnp.asarray(made).astype(x.dtype)
