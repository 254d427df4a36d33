"""What an accelerator gives against this machine's CPU: pictures, a training step, and that the host does not wait.

Run by `python -m pytest -m gpu -n 0 tests/test_gpu.py tests/test_attention.py`; skipped where there is none.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax import trees
from sdjax.formats import pipeline
from sdjax.methods.full import Full
from sdjax.runtime import mesh
from sdjax.training import optim
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import default_loss, initial_state, make_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() == "cpu", reason="no accelerator")]
RUN = Train(model="random:tiny", method=Full(("unet",)), steps=3, optim=Optim(lr=1e-4))
ROWS = 4


def cpu():
    return jax.default_device(jax.devices("cpu")[0])


def pictures(dtype):
    sd = pipeline.load("random:tiny", dtype)
    return sdjax.text2img(sd, ["a face", "a cat"], seeds=[1, 2], steps=5, guidance=5.0, size=64).astype(int)


def test_pictures_are_those_of_the_cpu():
    found = {dtype: pictures(dtype) for dtype in ("float32", "bfloat16")}
    with cpu():
        wanted = pictures("float32")
    assert np.abs(found["float32"] - wanted).max() <= 2
    assert np.abs(found["bfloat16"] - wanted).mean() <= 4


def run(compute, count=3):
    """Returns the losses of some steps, and the weights after them."""
    settings = dataclasses.replace(RUN, compute=compute)
    sd = pipeline.load("random:tiny").with_dtype(compute)
    trained, frozen = settings.method.split(sd, jax.random.key(0))
    tx, _ = optim.optimizer(settings.optim, settings.steps)
    step = make_step(settings.method, tx, jax.random.key(1), loss=default_loss(settings.method, settings))
    _, advance = mesh.compile(step, "single", ROWS)
    random, state, losses = np.random.default_rng(0), initial_state(trained, tx), []
    for n in range(count):
        batch = {
            "ids": {name: np.ones((ROWS, 16), np.int32) for name in sd.tokenizers},
            "index": np.arange(ROWS, dtype=np.int32) + n * ROWS,
            "weight": np.ones(ROWS, np.float32),
            "moments": random.standard_normal((ROWS, 32, 32, 8), np.float32),
        }
        state, metrics = advance(state, frozen, batch)
        losses.append(metrics["loss"])
    return np.array([float(loss) for loss in losses]), state["trained"]


def test_steps_of_training_are_those_of_the_cpu():
    (found, weights), (narrow, _) = run("float32"), run("bfloat16")
    with cpu():
        wanted, others = run("float32")
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    np.testing.assert_allclose(narrow, wanted, rtol=2e-2)
    flat, other = trees.flatten(weights), trees.flatten(others)
    worst = max(float(np.abs(np.asarray(flat[name]) - np.asarray(other[name])).max()) for name in flat)
    assert worst <= 4 * 3 * 1e-4  # AdamW moves a weight by its rate at most, whatever rounds


def test_the_host_does_not_wait_for_the_device_between_steps():
    """Products that take long are dispatched in a small share of their time."""

    @jax.jit
    def long(x):
        return jax.lax.fori_loop(0, 400, lambda _, y: jnp.tanh(y @ x), x)

    x = jnp.ones((4096, 4096), jnp.bfloat16)
    long(x).block_until_ready()
    start = time.perf_counter()
    y = long(long(x))
    host = time.perf_counter() - start
    y.block_until_ready()
    assert host < 0.2 * (time.perf_counter() - start)
