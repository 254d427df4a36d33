"""Checkpoints of the training state: whole or not at all, newest N kept, checked when read.

Orbax writes into a temporary folder and renames it, in the background.  It does not notice flipped bits in large arrays
(measured with 0.12.8), so each checkpoint carries a CRC-32 of every leaf; a damaged one is passed over with a warning
and the one before it is used.  Frozen weights are not stored, only their digest: another base model is refused.
"""

import warnings
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints in one folder."""

    def __init__(self, folder, keep=3):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state, base, wait=False):
        """Writes the state under its step; `base`: the digest of the frozen weights.  Returns at once unless `wait`."""
        step = int(state["step"])
        if step in self.manager.all_steps():
            return
        host = jax.tree.map(np.asarray, state) if jax.process_count() == 1 else state
        meta = {"base": base, "sums": _sums(host) if jax.process_count() == 1 else {}}
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(host), meta=ocp.args.JsonSave(meta))
        )
        if wait:
            self.wait()

    def wait(self):
        """Waits until everything that was saved is on disk."""
        self.manager.wait_until_finished()

    def restore(self, like, base):
        """Returns the newest whole state, or None where there is none; `like`: a state of the same shapes.

        Raises ValueError when the checkpoints belong to another base model or another set of weights.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            except Exception as error:  # a damaged file can raise anything; the one before it may be whole
                warnings.warn(
                    f"checkpoint {step} cannot be read ({type(error).__name__}); trying the one before it", stacklevel=2
                )
                continue
            if meta["base"] != base:
                raise ValueError(
                    f"out: its checkpoints belong to base model {meta['base']}, this run's is {base}; take another out"
                )
            state = self._state(step, like, meta)
            if state is not None:
                return state
        return None

    def _state(self, step, like, meta):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        wanted = set(meta["sums"]) or set(_names(like))
        if set(_names(like)) != wanted:
            raise ValueError(
                "out: its checkpoints hold other trained weights than this method and model; choose another out=DIR"
            )
        try:
            state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))["state"]
        except Exception as error:
            warnings.warn(
                f"checkpoint {step} cannot be read ({type(error).__name__}); trying the one before it", stacklevel=3
            )
            return None
        if meta["sums"] and _sums(state) != meta["sums"]:
            warnings.warn(f"checkpoint {step} is damaged (checksums differ); trying the one before it", stacklevel=3)
            return None
        return state

    def close(self):
        """Waits for pending writes and stops the background threads."""
        self.manager.close()


def _names(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _sums(tree):
    """Returns {leaf's path: CRC-32 of its bytes}."""
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
