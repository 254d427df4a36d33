"""Losses over the whole batch, of Clip and of Vae with a critic: alike on one device and on four; no microbatches."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from sdjax import trees
from sdjax.formats import pipeline
from sdjax.methods.clip import Clip
from sdjax.methods.vae import Vae
from sdjax.runtime import mesh
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import initial_state, make_step

CRITIC = Vae(recon="l2", critic=0.5, critic_start=0, critic_channels=8, critic_layers=2)
METHODS = {"clip": Clip(), "critic": CRITIC}


def batch(sd, size=8):
    """Returns rows that differ much, so that a loss of a part of them is another one."""
    random = np.random.default_rng(0)
    contrast = np.linspace(0.1, 1, size, dtype=np.float32)[:, None, None, None]
    return {
        "pixels": contrast * random.uniform(-1, 1, (size, 32, 32, 3)).astype(np.float32),
        "ids": sd.tokenize([f"a photo of {'abcdefgh'[i]} face" for i in range(size)]),
        "index": np.arange(size, dtype=np.int32),
        "weight": np.ones(size, np.float32),
    }


@pytest.mark.parametrize("name", ["clip", pytest.param("critic", marks=pytest.mark.slow)])
def test_four_devices_give_the_losses_of_one(name):
    assert jax.device_count() == 4
    method, sd = METHODS[name], pipeline.load("random:tiny")
    trained, frozen = method.split(sd, jax.random.key(0))
    rows, tx, found = batch(sd), optax.sgd(1e-2), {}
    step = make_step(method, tx, jax.random.key(1))
    for mode in ("single", "pmap"):
        place, run = mesh.compile(step, mode, 8)
        state, fixed = place.state(initial_state(trees.copy(trained), tx)), place.frozen(frozen)  # donated
        for i in range(2):  # the second step sees what the gradients of the first made
            state, metrics = run(state, fixed, place.batch(rows))
            found[mode, i] = {name: float(value) for name, value in metrics.items()}
    for i in range(2):
        for key, value in found["single", i].items():
            np.testing.assert_allclose(found["pmap", i][key], value, rtol=2e-4, err_msg=f"{key}, step {i}")


@pytest.mark.parametrize("name", METHODS)
def test_microbatches_are_refused(name, tmp_path):
    settings = Train(model="random:tiny", method=METHODS[name], optim=Optim(accumulate=2))
    with pytest.raises(ValueError, match=r"optim.accumulate=2: expected 1: \w+ needs the whole batch"):
        train(settings, tmp_path / "run")


def test_an_autoencoder_without_a_critic_takes_microbatches():
    assert not dataclasses.replace(CRITIC, critic=0.0).whole_batch and CRITIC.whole_batch
