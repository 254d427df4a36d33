"""Restores a run's frozen weights from their files: `frozen=bfloat16` rounds them for training, not for the export."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.stable_diffusion import TOKENS, StableDiffusion
from sdjax.training import base


def unrounded(frozen: StableDiffusion, settings: Any) -> StableDiffusion:
    """Returns the frozen model with its rounded weights replaced by settings.model's float32 weights.

    A weight is found by its rounded values, so its place in `frozen` does not matter.  Weights that the model's files
    do not have, such as those of a widened layer, stay rounded.
    """
    dtype = jnp.dtype(settings.frozen)
    if dtype == jnp.float32:
        return frozen
    with jax.default_device(jax.devices("cpu")[0]):  # the device may be full
        loaded = base.load(settings, perceptual=False)
    wide = [x for x in map(np.asarray, jax.tree.leaves(loaded)) if x.dtype == np.float32]
    found = {_mark(x.astype(dtype)): x for x in wide}
    for encoder in loaded.tokenizers:
        rows, table = np.asarray(loaded.table(encoder)), trees.flatten(frozen.parts.get(encoder, {})).get(TOKENS)
        if table is not None:  # it may have rows of new words after the file's
            found[_mark(table)] = np.concatenate([rows, np.asarray(table, np.float32)[len(rows) :]])
    return jax.tree.map(lambda x: found.get(_mark(x), x) if x.dtype == dtype else x, frozen)


def _mark(x):
    """Returns a key of an array's shape and values."""
    array = np.ascontiguousarray(np.atleast_1d(np.asarray(x)))
    return np.shape(x), hashlib.blake2b(array.view(np.uint8).data, digest_size=16).digest()
