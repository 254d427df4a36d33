"""A run's folder: whose it is, by the settings and the origin that are kept beside its checkpoints.

config.json holds the run's settings, origin.json the digest of what it started from (`begin` in loop.py).
"""

import contextlib
import os
import shutil
from pathlib import Path

import jax

from sdjax.formats.storage import files
from sdjax.runtime import locks
from sdjax.settings import CLASS, to_json

RUN = "Train"  # the class that a run's config.json names


def fresh(out):
    """Returns the folder of a new short run as a Path, what an older one left there removed.

    Raises ValueError where it is no run's, holds checkpoints, or a process has it.
    """
    out = Path(out)
    if not any(path.is_file() and path.name != locks.FILE for path in out.rglob("*")):
        return out
    with locks.held(out):
        _settings(out)
        if _has_checkpoints(out):
            raise ValueError(f"out={str(out)!r}: holds a run with checkpoints; choose another folder, or remove it")
        for path in out.iterdir():
            if path.name != locks.FILE:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with contextlib.suppress(OSError):  # another process has it by now, and `train` says so
        out.rmdir()
    return out


def check_folder(out, settings, base):
    """Raises ValueError where the folder holds what was learned by another method or from something else, or no run."""
    if not (out / "config.json").is_file():
        return
    there = _settings(out)
    if not _has_checkpoints(out) and not (out / "export").exists():
        return
    old, new = _learned(there), _learned(to_json(settings))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"out={str(out)!r}: its run had {name}={old.get(name)!r}, this one has {new.get(name)!r}; choose"
                " another out=DIR"
            )
    origin = out / "origin.json"
    if origin.is_file() and files.read_json(origin).get("base") != base:
        raise ValueError(f"out={str(out)!r}: its run started from another model or picture; choose another out=DIR")


def write_settings(out, settings, base):
    """Writes what a run is told and what it starts from: config.json and origin.json, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name, value in (("config", to_json(settings)), ("origin", {"base": base})):
        with files.new_file(out / f"{name}.json") as temporary:
            files.write_json(temporary, value)


def _has_checkpoints(out):
    """Returns whether a run's folder has any, whole or damaged."""
    return (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir())


def _settings(out):
    """Returns the JSON of the settings in a run's folder; raises ValueError where they are no run's."""
    path = out / "config.json"
    found = files.read_json(path) if path.is_file() else None
    if not isinstance(found, dict) or found.get(CLASS) != RUN:
        raise ValueError(f"out={str(out)!r}: holds other files than a run's; choose another out=DIR")
    return found


def _learned(settings):
    """Returns {dotted name: value} of methods, words and pictures in a run's JSON; the rest may change on the way."""
    leaves = jax.tree_util.tree_leaves_with_path({name: settings.get(name) for name in ("method", "data")})
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    kept = {name: leaf for name, leaf in named.items() if name.rpartition(".")[2] in ("class", "word", "path")}
    return {name: os.path.realpath(leaf) if name.endswith(".path") else leaf for name, leaf in kept.items()}
