"""Checkpoints of the training state: complete or absent, the newest N kept, checked when read.

Orbax writes into a temporary folder and renames it, in the background.  It does not notice flipped bits in large arrays
(measured with 0.12.8), so each checkpoint carries a CRC-32 of every leaf; a damaged one is renamed STEP.damaged, with a
warning, and the one before it is used.  Frozen weights are not stored, only their digest: another base model is
refused.
"""

import errno
import os
import shutil
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # what the errors of a damaged folder are


class Checkpoints:
    """The checkpoints in one folder: the newest `keep`, and those whose steps are in `kept`."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.damaged, self.kept = folder.absolute(), set(), set()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(keep, self.kept), cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: dict[str, Any], base: str, wait: bool = False) -> None:
        """Writes the state under its step; `base`: the digest of the frozen weights.  Returns at once unless `wait`."""
        step = int(state["step"])
        if step in self.manager.all_steps():
            return
        host = jax.tree.map(np.asarray, state) if jax.process_count() == 1 else state
        meta = {"base": base, "shapes": _shapes(host), "sums": _sums(host) if jax.process_count() == 1 else {}}
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(host), meta=ocp.args.JsonSave(meta))
        )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        self.manager.wait_until_finished()

    def restore(self, like: dict[str, Any], base: str, steps: Sequence[int] | None = None) -> dict[str, Any] | None:
        """Returns the newest complete state, or None; `like`: a state with the same shapes.

        steps: those that are looked for; None for all.
        The names of damaged ones are in `damaged` then, those of earlier times too.
        Raises ValueError when the checkpoints belong to another base model or another set of weights, and
        PermissionError where one may not be read.
        """
        self.damaged = {path.name for path in self.folder.glob("*.damaged")}
        for step in sorted(self.manager.all_steps(), reverse=True):
            if steps is not None and step not in steps:
                continue
            meta = self._read(step, "meta", ocp.args.JsonRestore())
            if meta is not None:
                _fits(meta, like, base)
                shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
                state = self._read(step, "state", ocp.args.StandardRestore(shapes))
                if state is not None and meta["sums"] in ({}, _sums(state)):
                    return state
            self._put_aside(step)
        return None

    def _read(self, step, part, how):
        """Returns a part of a checkpoint, None if it is damaged; raises errors of the machine."""
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**{part: how}))[part]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # a damaged file can raise anything; the one before it may be whole
            if isinstance(error, OSError) and error.errno not in (*ABSENT, errno.EACCES, None):
                raise
            warnings.warn(f"checkpoint {step}: {type(error).__name__} at its {part}", stacklevel=3)
            return None

    def _put_aside(self, step):
        """Renames a damaged checkpoint: as long as one bears the newest step, Orbax saves none of a lower step."""
        for path in (self.folder / str(step)).rglob("*"):
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        warnings.warn(f"checkpoint {step} is damaged; trying the one before it", stacklevel=3)
        aside = self.folder / f"{step}.damaged"
        self.damaged.add(aside.name)
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        self.manager.reload()

    def close(self) -> None:
        """Waits for pending writes and stops the background threads."""
        self.manager.close()


class _Kept:
    """Orbax's preservation policy: the newest n checkpoints, and those of `steps`."""

    def __init__(self, n, steps):
        self.n, self.steps = n, steps

    def should_preserve(self, checkpoints, *, context):
        newest = sorted(one.step for one in checkpoints)[-self.n :]
        return [one.step in self.steps or one.step in newest for one in checkpoints]


def _fits(meta, like, base):
    """Raises ValueError for a checkpoint of another base model or with other weights."""
    if meta["base"] != base:
        raise ValueError(
            f"out: its checkpoints belong to base model {meta['base']}, this run's is {base}; take another out"
        )
    found, wanted = meta.get("shapes") or {}, _shapes(like)
    if found != wanted:
        weights = [{k: shape for k, shape in tree.items() if k.startswith("['trained']")} for tree in (found, wanted)]
        what = "trained weights than this method and model" if weights[0] != weights[1] else "kind of optim or ema"
        raise ValueError(f"out: its checkpoints hold another state, of another {what}; choose another out=DIR")


def _shapes(tree):
    """Returns {leaf's path: shape}."""
    return {jax.tree_util.keystr(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _sums(tree):
    """Returns {leaf's path: CRC-32 of its bytes}."""
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8).data)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
