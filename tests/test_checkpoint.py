"""Checkpoints: whole or passed over, refused where they are another run's, left alone where the machine fails."""

import errno
import os

import numpy as np
import pytest

from sdjax.training.checkpoint import Checkpoints


# A read that Orbax gave up on may end after its event loop, on a busy machine.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    state = {"step": np.int32(1), "trained": {"w": np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)}}
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(state, "base", wait=True)
    checkpoints.save({**state, "step": np.int32(2)}, "base", wait=True)
    checkpoints.close()
    files = [path for path in (tmp_path / "2").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    again = Checkpoints(tmp_path, keep=3)
    found = again.restore(state, "base")
    (line,) = capsys.readouterr().err.splitlines()
    assert int(found["step"]) == 1 and f"{tmp_path / '2'}: its " in line and "renamed 2.damaged" in line
    assert (tmp_path / "2.damaged").is_dir()
    again.save({**state, "step": np.int32(2)}, "base", wait=True)  # and saving goes on
    assert int(Checkpoints(tmp_path).restore(state, "base")["step"]) == 2


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    """Tensorstore raises ValueError, Orbax misses a file; root may read all, so access is said not to be."""
    state = {"step": np.int32(1), "trained": {"w": np.zeros(3, np.float32)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, "base", wait=True)

    def forbidden(*inputs, **options):
        raise ValueError("PERMISSION_DENIED: Error opening file")

    monkeypatch.setattr(checkpoints.manager, "restore", forbidden)
    monkeypatch.setattr(os, "access", lambda path, mode: "state" not in str(path))
    with pytest.raises(PermissionError, match="Permission denied: .*state"):
        checkpoints.restore(state, "base")
    assert (tmp_path / "1").is_dir()


def test_a_machine_that_fails_while_reading_damages_no_checkpoint(tmp_path, monkeypatch):
    state = {"step": np.int32(1), "trained": {"w": np.zeros(3, np.float32)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, "base", wait=True)

    def fails(*inputs, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints.manager, "restore", fails)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.restore(state, "base")
    assert (tmp_path / "1").is_dir()


def test_another_base_model_is_refused(tmp_path):
    state = {"step": np.int32(1), "trained": {"w": np.zeros(3, np.float32)}}
    Checkpoints(tmp_path).save(state, "base", wait=True)
    with pytest.raises(ValueError, match="belong to base model base, this run's is other"):
        Checkpoints(tmp_path).restore(state, "other")


def test_other_weights_of_the_same_names_are_refused(tmp_path):
    state = {"step": np.int32(1), "trained": {"w": np.zeros(3, np.float32)}}
    Checkpoints(tmp_path).save(state, "base", wait=True)
    with pytest.raises(ValueError, match="another state, of another trained weights"):
        Checkpoints(tmp_path).restore({**state, "trained": {"w": np.zeros(4, np.float32)}}, "base")
