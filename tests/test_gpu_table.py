"""benchmarks/gpu.py: what its table says of measurements, which jobs failed or were late, and the whole on a CPU."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from sdjax.runtime import compile_cache

ROOT = Path(__file__).parents[1]
PEERS_TOO = [
    "text2img, batch 1",
    "text2img, batch 2",
    "UNet call",
    "VAE decode",
    "training step, full",
    "training step, LoRA",
]


@pytest.fixture
def gpu(monkeypatch):
    """The program as a module, which leaves this process's cache of programs as it is."""
    monkeypatch.setattr(compile_cache, "keep", lambda *folder, steps: None)
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return importlib.import_module("gpu")


def about(**more):
    return {"device": "one", "date": "today", "seconds": 9, "failed": [], "rows": 8, **more}


def test_the_table_has_every_row_and_says_what_was_not_measured(gpu):
    found = [
        {"row": "text2img, batch 8", "who": "sdjax", "seconds": 2.0, "steps_s": 25.0, "peak_GB": 7.0},
        {"row": "text2img, batch 8", "who": "diffusers", "seconds": 3.0, "steps_s": 16.7, "peak_GB": 6.0},
        {"row": "text2img, batch 8", "who": "torch.compile", "seconds": 2.5, "steps_s": 20.0},
        {"row": "first picture", "who": "sdjax", "seconds": 41.0, "warm": False,
         "compiled_s": 30.0, "programs": 9, "from_cache": 0},
        {"row": "first picture", "who": "sdjax", "seconds": 9.5, "warm": True},
        {"row": "training step, full", "who": "sdjax", "seconds": 0.25, "trace_s": 1, "lower_s": 2, "compile_s": 30,
         "host_s": 0.004, "dispatch_s": 0.005, "python_s": 0.002},
    ]  # fmt: skip
    lines = gpu.markdown(about(failed=["eager LoRA"]), found).splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert set(gpu.TABLE) <= set(rows)
    assert rows["text2img, batch 8"] == (
        "| text2img, batch 8 | 1.15 x torch.compile | 2 s (25.0 it/s) | 3 s (16.7 it/s) | 2.5 s (20.0 it/s) | 1.25 "
        "| 7.0 / 6.0 |  |"
    )
    assert "| 41 s | not measured |" in rows["first picture"] and "9 programs, 30.0 s, 0 from" in rows["first picture"]
    assert "| 9.5 s |" in rows["first picture, warm"]
    assert rows["training step, full"].endswith(
        "traced 1.0, lowered 2.0, compiled 30.0 s; host 4.0, dispatch 5.0, Python 2.0 ms |"
    )
    assert rows["VAE decode"].count("not measured") == 3
    assert "Failed or out of time: eager LoRA." in lines


def test_a_job_that_fails_or_is_late_is_named_and_the_table_is_written(gpu, tmp_path):
    given = ["--model", "random:none", "--only", "pictures", "--out", str(tmp_path), "--minutes"]
    assert gpu.main([*given, "0"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["about"]["failed"]) == {"pictures"} and found["rows"] == []
    assert "not measured" in (tmp_path / "gpu.md").read_text()


def test_a_job_with_flags_of_xla_has_them_and_a_row_beside_the_table(gpu, tmp_path, monkeypatch):
    started = {}
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda command, env, **_: started.update({command[3]: env}))
    options = gpu.parser().parse_args(["--flags", "--only", "pictures"])
    options.vision, options.steps, options.size = "", 50, 512
    wave = gpu.waves(options)[-1]
    for job, warm in [*wave, ("pictures", False)]:
        gpu.start(options, job, warm, {"XLA_FLAGS": "--own"}, tmp_path)
    assert [started[job]["XLA_FLAGS"] for job, _ in wave] == [f"--own {flags}" for flags in gpu.FLAGS.values()]
    assert started["pictures"]["XLA_FLAGS"] == "--own" and len(gpu.FLAGS) == 5
    found = [{"row": "text2img, batch 8, channels first", "who": "sdjax", "seconds": 3.0, "flags": "--nchw"}]
    last = gpu.markdown(about(), found).splitlines()[-1]
    assert last.endswith("| 3 s | not measured | not measured |  |  | --nchw |")


@pytest.mark.slow
def test_the_whole_table_is_filled_on_a_cpu(gpu, tmp_path):
    assert gpu.main(["--model", "random:tiny", "--inside", "--rows", "2", "--flags", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    table = [line.split(" | ") for line in lines if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    assert all(cells[2] != "not measured" for cells in table), table
    assert {cells[0].removeprefix("| ") for cells in table} >= set(gpu.TABLE) - {"text2img, batch 8"}
    assert len([cells for cells in table if cells[-1].startswith("--xla_gpu")]) == 2 * len(gpu.FLAGS)
    for row in PEERS_TOO:
        assert {one["who"] for one in found if one["row"] == row} == set(gpu.WHO), row
    steps = [one for one in found if one["row"].startswith("training step") and one["who"] == "sdjax"]
    assert all(0 < one["python_s"] and 0 < one["host_s"] and one["trained"] for one in steps)
