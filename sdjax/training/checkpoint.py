"""Checkpoints of the training state: complete or absent, the newest N kept, checked when read.

Orbax writes into a temporary folder and renames it, in the background.  It does not notice flipped bits in large arrays
(measured with 0.12.8), so each checkpoint carries a CRC-32 of every leaf; a damaged one is renamed STEP.damaged, with a
warning, and the one before it is used.  Frozen weights are not stored, only their digest: another base model is
refused.

With several processes each writes its parts of the leaves and their CRC-32, and each reads all leaves; so a run goes
on with another mesh or another number of processes.
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
from jax.experimental import multihost_utils

from sdjax.runtime import processes

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
        several = processes.several()
        host = state if several else jax.tree.map(np.asarray, state)
        sums = _sums_of_parts(host) if several else _sums(host)
        meta = {"base": base, "shapes": _shapes(host), "sums": sums}
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
            if processes.every(meta is not None) and meta is not None:
                _fits(meta, like, base)
                # Arrays of numpy: as shapes they would come on the devices of those who saved.
                empty = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
                state = self._read(step, "state", ocp.args.StandardRestore(empty))
                if processes.every(state is not None and _whole(state, meta["sums"])):  # by all or none
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
        if processes.first():
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        processes.wait()
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
    return {jax.tree_util.keystr(path): _sum(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _sum(array):
    return zlib.crc32(np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).data)


def _sums_of_parts(tree):
    """Returns {leaf's path: [[[first, last] of each dimension, CRC-32] of each part]} of leaves over all processes."""
    parts, own = {}, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        spans = sorted({_span(index, leaf.shape) for index in leaf.sharding.devices_indices_map(leaf.shape).values()})
        here = {_span(one.index, leaf.shape): one for one in leaf.addressable_shards if one.replica_id == 0}
        parts[jax.tree_util.keystr(path)] = spans
        own += [_sum(here[span].data) if span in here else 0 for span in spans]
    sums = iter(multihost_utils.process_allgather(np.array(own, np.uint32)).sum(0, dtype=np.uint32).tolist())
    return {name: [[span, next(sums)] for span in spans] for name, spans in parts.items()}


def _span(index, shape):
    return tuple(one.indices(n)[:2] for one, n in zip(index, shape, strict=True))


def _whole(state, sums):
    """Returns whether the leaves of a state have a checkpoint's sums, of leaves or of their parts."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state) if sums else ():
        told = sums.get(jax.tree_util.keystr(path))
        parts = told if isinstance(told, list) else [[[], told]]
        if any(_sum(leaf[tuple(slice(*span) for span in spans)]) != wanted for spans, wanted in parts):
            return False
    return True
