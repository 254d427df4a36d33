"""Runs whose length the clock decides."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.methods.vae import Vae
from sdjax.settings import SettingError
from sdjax.training import loop, optim, pace, schedules
from sdjax.training.optim import Optim
from sdjax.training.settings import Train

RUN = Train(
    model="random:tiny",
    method=Vae(recon="l2"),
    data=Data(path="pocketland", size=32, batch=2, encode=False, source=Pocketland(count=8)),
    optim=Optim(lr=1e-3, schedule="cosine", warmup=2),
    steps=100_000,
    log=1,
)


@pytest.mark.parametrize("schedule", schedules.FALLS)
@pytest.mark.parametrize("warmup", [0, 3])
def test_rates_are_those_of_a_run_of_that_length(schedule, warmup):
    made = Optim(lr=0.5, schedule=schedule, warmup=warmup, end=0.2, cycles=3, power=2.0)
    theirs = optim.rate(made, 11)
    ours = [float(schedules.rate(made, n, jnp.float32(11))) for n in range(14)]
    np.testing.assert_allclose(ours, [float(theirs(n)) for n in range(14)], rtol=1e-6, atol=1e-8)


def test_the_length_follows_the_clock():
    """A compilation of 30 s, then steps of 0.1 s that become twice as slow: the length is right in the end."""
    now = [0.0]
    clock = pace.Pace(2.0, 0.0, 0.0, clock=lambda: now[0])
    lengths, step = [], 0
    while not clock.over:
        now[0] += 30 if step == 0 else 0.1 if step < 200 else 0.2
        step += 1
        lengths += [] if (length := clock.after(step)) is None else [length]
    assert lengths[0] == pytest.approx(901, rel=0.02) and lengths[-1] == pytest.approx(step, abs=3)
    assert abs(step - (1 + 199 + (120 - 30 - 19.9) / 0.2)) < 1 and 8 < len(lengths) < 30


def test_a_run_ends_on_time_and_knows_that_it_is_done(tmp_path, monkeypatch):
    """By a clock that goes on by half a second whenever it is looked at."""
    ticks = itertools.count(step=0.5)
    clocked = lambda minutes, share, began: pace.Pace(minutes, share, 0.0, lambda: next(ticks))  # noqa: E731
    monkeypatch.setattr(loop, "Pace", clocked)
    run = dataclasses.replace(RUN, minutes=0.5)
    loop.train(run, tmp_path)

    def steps():
        rows = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if "loss" in row]

    assert 10 < len(steps()) < 60
    assert steps()[-1]["rate"] < 0.05 * max(row["rate"] for row in steps())  # the schedule has come to its end
    before = len(steps())
    loop.train(run, tmp_path)
    assert len(steps()) == before


def test_optimizers_that_plan_their_length_are_refused():
    with pytest.raises(SettingError, match=r"minutes=1.0: expected 0 with optim.kind=prodigy"):
        dataclasses.replace(RUN, minutes=1.0, optim=Optim(kind="prodigy", lr=1.0))


def without_convolutions(sd):
    """Returns a model whose autoencoder has no 1x1 convolutions around its latents."""
    network = sd.networks["vae"]
    config = dataclasses.replace(network.config, use_quant_conv=False, use_post_quant_conv=False)
    kept = {name: tree for name, tree in sd.parts["vae"].items() if not name.endswith("quant_conv")}
    return sd.with_networks(vae=network.clone(config=config)).with_parts(vae=kept)


@pytest.mark.parametrize("pattern", ["", "^(encoder|decoder)", r"^(encoder|quant_conv)\."])
@pytest.mark.parametrize("convolutions", [True, False])
def test_an_autoencoder_ends_with_latents_of_unit_variance(convolutions, pattern):
    """By its weights, trained or not, with the model's factor; by the factor where it has no 1x1 convolutions."""
    sd = pipeline.load("random:tiny")
    sd = sd if convolutions else without_convolutions(sd)
    data, method = batches.build(RUN.data, sd, 0), Vae(pattern=pattern)
    trained, frozen = method.split(sd)
    after = method.join(*method.finish(frozen, trained, data))
    pixels = jnp.concatenate([data[step]["pixels"] for step in range(4)])
    np.testing.assert_allclose(after.decode(after.encode(pixels)), sd.decode(sd.encode(pixels)), atol=2e-4)
    assert float(jnp.std(after.encode(pixels))) == pytest.approx(1, abs=0.02)
    assert (after.scaling == sd.scaling) == convolutions
    keys = jax.random.split(jax.random.key(0), len(pixels))
    drawn = [one.latents(one.moments(pixels), jax.random.clone(keys)) / one.scaling for one in (after, sd)]
    gains = [jnp.std(x - one.encode(pixels) / one.scaling) / jnp.std(one.encode(pixels) / one.scaling)
             for x, one in zip(drawn, (after, sd), strict=True)]  # fmt: skip
    assert float(gains[0]) == pytest.approx(float(gains[1]), rel=1e-3)  # the noise is scaled with the mean
