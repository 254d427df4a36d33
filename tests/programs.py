"""Programs as modules, and pictures to give them."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sdjax.runtime import compile_cache

ROOT = Path(__file__).parents[1]


def load(path, monkeypatch):
    """Returns the module of a program, which then keeps no compiled programs in the user's folder."""
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.pop(spec.name, None)
    spec.loader.exec_module(module)
    monkeypatch.setattr(compile_cache, "keep", lambda **_: None)
    return module


def sample(task, out, *arguments):
    """Runs a program of sample/; returns the new pictures' paths in order, or its exit status where it failed."""
    from sdjax.service import programs

    before = set(Path(out).glob("*"))
    status = programs.main(task, "", [*map(str, arguments), "--out", str(out)])
    made = sorted(path for path in set(Path(out).glob("[0-9]*")) - before if path.suffix != ".json")
    return status or made


def photo(path, seed=0):
    """Writes a picture of noise and returns its path as text."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    return str(path)
