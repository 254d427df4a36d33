"""Runs: resumed to the same bits, alike in every parallel mode, stopped by signals and numbers that are not finite."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from sdjax import trees
from sdjax.convert import pipeline
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.methods.clip import Clip
from sdjax.methods.full import Full
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training import optim, parallel
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.loop import Train, default_loss, initial_state, make_step, train
from sdjax.training.optim import Optim

ROOT = Path(__file__).parents[1]
DATA = Data(path="pocketland", size=32, batch=4, count=16)
RUN = Train(
    model="random:tiny",
    method=Full(("unet",), "attn2"),
    data=DATA,
    optim=Optim(lr=1e-3),
    steps=6,
    checkpoint=2,
    ema=0.9,
)


def final(folder, settings):
    sd = pipeline.load(settings.model)
    trained, frozen = settings.method.split(sd, trees.named_key(jax.random.key(settings.seed), "split"))
    like = initial_state(trained, optim.transform(settings.optim, settings.steps), settings.ema)
    return Checkpoints(folder / "checkpoints").restore(like, trees.digest((frozen, "")))


def test_resumed_run_ends_in_the_same_bits(tmp_path):
    train(RUN, tmp_path / "whole")
    train(dataclasses.replace(RUN, steps=4, optim=RUN.optim), tmp_path / "parts")
    train(RUN, tmp_path / "parts")
    one, other = (final(tmp_path / name, RUN) for name in ("whole", "parts"))
    assert int(one["step"]) == int(other["step"]) == 6
    assert trees.digest(one) == trees.digest(other)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["event"]) for line in lines if "event" in line] == [(0, "started"), (4, "resumed")]
    assert (tmp_path / "whole" / "export" / "model_index.json").is_file()


@functools.cache
def losses(mode):
    settings = dataclasses.replace(RUN, parallel=mode, data=dataclasses.replace(DATA, batch=8))
    sd = pipeline.load(settings.model)
    trained, frozen = settings.method.split(sd, jax.random.key(0))
    data = batches.build(settings.data, frozen, 0)
    tx = optim.transform(settings.optim, 5)
    step = make_step(settings.method, tx, jax.random.key(1), loss=default_loss(settings.method, settings), ema=0.9)
    place, run = parallel.compile(step, mode, 8)
    state, fixed, found = place.state(initial_state(trained, tx, 0.9)), place.frozen(frozen), []
    for _, batch in zip(range(3), data.iterate(), strict=False):
        state, metrics = run(state, fixed, place.batch(batch))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("mode", [pytest.param("mesh", marks=pytest.mark.slow), "mesh:data=2,fsdp=2", "pmap"])
def test_parallel_modes_give_the_losses_of_one_device(mode):
    np.testing.assert_allclose(losses(mode), losses("single"), rtol=2e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh:data=3,fsdp=9", "needs 27 devices; there are 4"),
        ("cluster", "accepted are single, pmap, mesh"),
        ("pmap:data=2", "accepted"),
    ],
)
def test_parallel_settings_that_do_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        parallel.parse(text)
    with pytest.raises(ValueError, match="data.batch=6"):
        parallel.compile(None, "mesh", 6)


def test_large_leaves_are_sharded_small_ones_copied():
    large, small = jax.ShapeDtypeStruct((1024, 2048), np.float32), jax.ShapeDtypeStruct((64,), np.float32)
    assert tuple(parallel.shard(large, 2)) == (None, "fsdp")
    assert tuple(parallel.shard(small, 2)) == ()


def test_damaged_checkpoint_is_passed_over(tmp_path):
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
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = Checkpoints(tmp_path).restore(state, "base")
    assert int(found["step"]) == 1 and any("checkpoint 2" in str(one.message) for one in seen)


def test_another_base_model_is_refused(tmp_path):
    state = {"step": np.int32(1), "trained": {"w": np.zeros(3, np.float32)}}
    Checkpoints(tmp_path).save(state, "base", wait=True)
    with pytest.raises(ValueError, match="belong to base model base, this run's is other"):
        Checkpoints(tmp_path).restore(state, "other")


def test_loss_that_is_not_finite_stops_before_a_checkpoint(tmp_path):
    bad = dataclasses.replace(RUN, optim=Optim(lr=1e30, clip=None), checkpoint=1)
    with pytest.raises(FloatingPointError, match="the loss of step"):
        train(bad, tmp_path / "bad")
    saved = final(tmp_path / "bad", bad)
    assert (
        saved is None or all(np.isfinite(x).all() for x in jax.tree.leaves(saved["trained"])) or int(saved["step"]) == 1
    )


def test_contrastive_training_refuses_microbatches(tmp_path):
    with pytest.raises(ValueError, match="optim.accumulate=2"):
        train(dataclasses.replace(RUN, method=Clip(), optim=Optim(accumulate=2)), tmp_path / "clip")


def test_batches_are_a_function_of_the_step():
    data = batches.build(DATA, pipeline.load("random:tiny"), 0)
    stream = data.iterate(start=3)
    for step in (3, 4, 5):
        one, other = next(stream), data[step]
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
        assert one["index"].tolist() == list(range(4 * step, 4 * step + 4))


STEPS = 24
COMMAND = [
    sys.executable, "train/run.py", "tests/data/run.py", "model=random:tiny", "data.path=pocketland", "data.size=32",
    "data.count=16",
]  # fmt: skip


def start(out, *more):
    """Starts the run in a process of its own; what it says goes to a file beside `out`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with open(f"{out}.txt", "a") as said:
        return subprocess.Popen(
            [*COMMAND, f"out={out}", f"steps={STEPS}", *more], cwd=ROOT, env=env, stdout=said, stderr=said
        )


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not any(path.glob("[0-9]*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def ended(out, process):
    """Returns the digest of the final state of a run that must end well."""
    assert process.wait(300) == 0, Path(f"{out}.txt").read_text()[-2000:]
    settings = dataclasses.replace(RUN, method=TextualInversion("<new>", "face"), steps=STEPS, optim=Optim(), ema=0.0)
    return trees.digest(final(out, settings))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return ended(out, start(out))


def killed_and_resumed(out, kill, seconds):
    """Returns the digest of a run stopped by `kill` some seconds after its first checkpoint and started again."""
    process = start(out)
    wait_for(out / "checkpoints", process)
    time.sleep(seconds)
    process.send_signal(kill)
    process.wait(60)
    return ended(out, start(out))


@pytest.mark.parametrize("kill", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_run_ends_as_the_undisturbed_one(tmp_path, kill, undisturbed):
    assert killed_and_resumed(tmp_path / "run", kill, 0.3) == undisturbed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    begun = [line["step"] for line in lines if line.get("event") in ("started", "resumed")]
    assert len(begun) == 2 and 0 < begun[1] < STEPS
    before = max(line["step"] for line in lines[: lines.index({"step": begun[1], "event": "resumed"})])
    assert begun[1] >= before - 10  # what is logged every 10 steps has a checkpoint of every step behind it


@pytest.mark.slow
def test_twenty_killed_runs_end_as_the_undisturbed_one(tmp_path, undisturbed):
    seconds = np.random.default_rng(0).uniform(0, 1.5, 20)
    same = [
        killed_and_resumed(tmp_path / str(i), signal.SIGKILL, wait) == undisturbed for i, wait in enumerate(seconds)
    ]
    assert sum(same) == 20
