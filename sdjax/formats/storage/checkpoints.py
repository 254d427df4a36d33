"""Single files of weights: safetensors, or pickles with or without a training state around the weights.

weights, metadata, steps = opened("v1-5-pruned.ckpt")       # reads names and shapes; the numbers only when used
"""

import pathlib
from typing import Any

import numpy as np

from sdjax.formats.storage import files, pickles
from sdjax.formats.storage.tensor_file import TensorFile


def opened(path: str | pathlib.Path) -> tuple[files.Stored, dict[str, str], int | None]:
    """Returns (weights, metadata, number of training steps or None) of a file with any ending.

    weights: a TensorFile or Arrays.
    Raises ValueError naming a damaged file or one without weights.
    """
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        safe = file.read(9)[8:] == b"{"
    if not safe:
        value = pickles.read(path)
        state = state_of(value)
        if state is None:
            raise ValueError(f"{path}: holds no weights by name")
        return files.Arrays(path, state), {}, value.get("global_step")
    file = TensorFile(path)
    return file, file.metadata, None


def state_of(value: Any) -> dict[str, np.ndarray] | None:
    """Returns {name: array} of a pickled checkpoint's value, whether or not under "state_dict"; None for others."""
    state = value.get("state_dict", value) if type(value) is dict else None
    return {name: x for name, x in state.items() if type(x) is np.ndarray} if type(state) is dict else None
