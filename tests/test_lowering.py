"""The programs of Stable Diffusion 1.5 stay small: a third of the operations from before layers shared functions."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BEFORE = {
    "sampling": 7847,
    "E4T tuning step": 76654,
}  # of commit 3498d3f, for CUDA without its kernel; docs/log/2026-11.md


@pytest.mark.parametrize("name", ["sampling", pytest.param("E4T tuning step", marks=pytest.mark.slow)])
def test_a_program_has_a_third_of_the_operations(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.chdir(ROOT)
    lowering = importlib.import_module("lowering")
    run, arguments = lowering.sampling(8, "bfloat16") if name == "sampling" else lowering.tuning(16)
    text = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert 1000 < lowering.operations(text) <= BEFORE[name] / 3
