"""Checkpoints of the training state: complete or absent, the newest N kept, verified when read.

Orbax writes into a temporary folder and renames it, in the background.  It does not notice flipped bits in large arrays
(measured with 0.12.8), so each checkpoint has a CRC-32 of every leaf and of its meta file.  A damaged checkpoint is
renamed STEP.damaged, with a one-line note, and the previous one is used.  Frozen weights are not stored, only their
digest; a checkpoint of another base model is an error.

Of several processes, each writes its parts of the leaves with their CRC-32, and each reads all leaves.  So a run can
resume with another mesh or number of processes.
"""

import contextlib
import errno
import gc
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sdjax.formats.storage import files
from sdjax.runtime import processes, room

SEAL = "seal"  # key in the meta file: the CRC-32 of its other entries
KEYS = {"base", "shapes", "sums"}  # the other entries; older meta files have no seal
ELSEWHERE = "another process cannot read it"
SPARE = 1 << 20  # bytes of a checkpoint besides its arrays
FULL = re.compile(r"No space left|RESOURCE_EXHAUSTED|ENOSPC|Disk quota", re.IGNORECASE)  # in libraries' messages
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # errors of reading a damaged folder


class Checkpoints:
    """The checkpoints in one folder: the newest `keep`, and the steps in `kept`.

    tidy: remove the remains of unfinished saves; False for reading only.
    """

    def __init__(self, folder: Path, keep: int = 3, tidy: bool = True) -> None:
        self.folder, self.damaged, self.kept = folder.absolute(), set(), set()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(keep, self.kept), cleanup_tmp_directories=tidy, enable_async_checkpointing=True
        )
        with _quiet():
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: dict[str, Any], base: str, wait: bool = False) -> None:
        """Writes the state under its step; `base`: the digest of the frozen weights.  Returns at once unless `wait`.

        Raises NoRoom, naming the folder and the last good checkpoint, if the disk is too small.
        """
        step = int(state["step"])
        if step in self.manager.all_steps():
            return
        several = processes.several()
        host = state if several else jax.tree.map(np.asarray, state)
        sums = _sums_of_parts(host) if several else _sums(host)
        meta = {"base": base, "shapes": _shapes(host), "sums": sums}
        meta |= {SEAL: _seal(meta)}
        with self._written():
            files.check_room(self.folder, sum(x.nbytes for x in jax.tree.leaves(host)) + SPARE)
            self.manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(host), meta=ocp.args.JsonSave(meta))
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until all checkpoints are on disk; raises the errors of `save`."""
        with self._written():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Turns a full disk's errors into NoRoom with one line: the folder, and the checkpoint that is safe."""
        try:
            with _quiet():
                yield
        except Exception as error:  # Orbax and tensorstore raise many kinds, also from an earlier save
            full = isinstance(error, room.NoRoom) or FULL.search(str(error))
            if not full or isinstance(error, jax.errors.JaxRuntimeError):  # the device's memory, or a lost process
                raise
            good = max(self.manager.all_steps(), default=None)
            safe = "no checkpoint is there yet" if good is None else f"checkpoint {good} is whole, start again from it"
            raise room.NoRoom(f"{self.folder}: no room on the disk for a checkpoint; {safe}") from error

    def restore(self, like: dict[str, Any], base: str, steps: Sequence[int] | None = None) -> dict[str, Any] | None:
        """Returns the newest complete state, or None; `like`: a state with the same shapes.

        steps: the steps to consider; None for all.
        Sets `damaged` to the names of damaged checkpoints, including earlier ones.
        Raises ValueError if the checkpoints belong to another base model or another set of weights, PermissionError if
        one may not be read.
        """
        self.damaged = {path.name for path in self.folder.glob("*.damaged*")}
        for step in sorted(self.manager.all_steps(), reverse=True):
            if steps is not None and step not in steps:
                continue
            state, why = self._found(step, like, base)
            if processes.every(not why):  # all processes restore it, or none
                return state
            self._put_aside(step, why or ELSEWHERE)
        return None

    def _found(self, step, like, base):
        """Returns (state, "") for an intact checkpoint, (anything, the reason) for a damaged one."""
        meta, why = self._read(step, "meta", ocp.args.JsonRestore())
        if not why and not _sealed(meta):
            why = "its meta file was changed"
        if not processes.every(not why):
            return None, why or ELSEWHERE
        _fits(meta, like, base)
        # Numpy arrays, since shapes would restore to the devices of the saving processes.
        empty = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        state, why = self._read(step, "state", ocp.args.StandardRestore(empty))
        if not why and (not _whole(state, meta["sums"]) or int(state["step"]) != step):
            why = "its numbers are not those that were saved"
        return state, why

    def _read(self, step: int, part: str, how: Any) -> tuple[Any, str]:
        """Returns (a part of a checkpoint, ""), or (None, the reason) if it is damaged; raises the machine's errors."""
        with _quiet():
            try:
                return self.manager.restore(step, args=ocp.args.Composite(**{part: how}))[part], ""
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # a damaged file can raise any error
                if isinstance(error, OSError) and error.errno not in (*ABSENT, errno.EACCES, None):
                    raise
                why = f"its {part} cannot be read, {type(error).__name__}"
            gc.collect()  # reads that Orbax abandoned report their errors when they are collected
        return None, why

    def _put_aside(self, step, why):
        """Renames a damaged checkpoint; otherwise Orbax would not save lower steps."""
        for path in (self.folder / str(step)).rglob("*"):
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        place, aside = self.folder / str(step), self.folder / processes.led(lambda: self._aside(step))
        self.damaged.add(aside.name)
        if processes.first():
            kept = f"; renamed {aside.name}" * (not place.is_symlink())  # reading works on links
            print(f"note: {place.resolve()}: {why}{kept}; the one before it is tried", file=sys.stderr)
            place.rename(aside)
        processes.wait()
        self.manager.reload()

    def _aside(self, step):
        """Returns an unused name for a damaged checkpoint: STEP.damaged, STEP.damaged-2, ..."""
        name, number = f"{step}.damaged", 1
        while (self.folder / name).exists():
            name, number = f"{step}.damaged-{number + 1}", number + 1
        return name

    def close(self) -> None:
        """Waits for pending writes and stops the background threads."""
        self.manager.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's error reports off the terminal; the errors themselves are raised, with one line each."""
    told = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [one.level for one in told], sys.unraisablehook
    for one in told:
        one.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for one, level in zip(told, before, strict=True):
            one.setLevel(level)


class _Kept:
    """Orbax's preservation policy: the newest n checkpoints, and the ones with a step in `steps`."""

    def __init__(self, n, steps):
        self.n, self.steps = n, steps

    def should_preserve(self, checkpoints, *, context):
        newest = sorted(one.step for one in checkpoints)[-self.n :]
        return [one.step in self.steps or one.step in newest for one in checkpoints]


def _sealed(meta):
    """Returns whether a meta file is unchanged; older ones have no seal."""
    if not isinstance(meta, dict) or meta.keys() - {SEAL} != KEYS:
        return False
    return SEAL not in meta or meta[SEAL] == _seal({name: meta[name] for name in KEYS})


def _seal(meta):
    """Returns the CRC-32 of a meta file's content."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


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
    """Returns {leaf's path: [[span, CRC-32] of each part]} over all processes; a span is (first, end) per dimension."""
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
    """Returns whether a state matches a checkpoint's sums, which are per leaf or per part of a leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state) if sums else ():
        told = sums.get(jax.tree_util.keystr(path))
        parts = told if isinstance(told, list) else [[[], told]]
        if any(_sum(leaf[tuple(slice(*span) for span in spans)]) != wanted for spans, wanted in parts):
            return False
    return True
