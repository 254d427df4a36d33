"""Flags of XLA and the folder that programs set before they compile; the tests themselves compile with their own."""

import os

import jax
import pytest

from sdjax.runtime import compile_cache


@pytest.fixture
def kept(monkeypatch):
    """A function of keep's arguments: (XLA_FLAGS, JAX's settings) as it leaves them on a machine with a CPU alone."""

    def keep(**arguments):
        settings = {}
        monkeypatch.setattr(jax.config, "update", settings.__setitem__)
        compile_cache.keep(**arguments)
        return os.environ.get("XLA_FLAGS", "").split(), settings

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(compile_cache, "ACCELERATED", ())
    monkeypatch.setattr(compile_cache, "_knows_quick", lambda: True)
    return keep


@pytest.mark.parametrize(
    ("steps", "flags"),
    [
        (None, compile_cache.QUICK),
        (1, (*compile_cache.QUICK, *compile_cache.SMALL)),
        (compile_cache.FEW, (*compile_cache.QUICK, *compile_cache.SMALL)),
        (compile_cache.FEW + 1, compile_cache.QUICK),
    ],
)
def test_flags(kept, steps, flags):
    assert kept(steps=steps)[0] == list(flags)


def test_own_flags_come_last(kept, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert kept(steps=1)[0] == [*compile_cache.QUICK, *compile_cache.SMALL, "--xla_backend_optimization_level=3"]


def test_accelerator(kept, monkeypatch):
    monkeypatch.setattr(compile_cache, "ACCELERATED", ("json",))  # a package that is there
    assert kept(steps=1)[0] == []


def test_other_xla(kept, monkeypatch):
    monkeypatch.setattr(compile_cache, "_knows_quick", lambda: False)
    assert kept(steps=1)[0] == []


def test_folder(kept, monkeypatch, tmp_path):
    name = "jax_compilation_cache_dir"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert kept()[1][name].endswith(os.path.join(".cache", "sdjax", "compiled"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert kept()[1][name] == str(tmp_path)
    assert kept(folder=tmp_path / "own")[1][name] == str(tmp_path / "own")
