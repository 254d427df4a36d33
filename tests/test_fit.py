"""fit=: settings for a device's memory against what the compiler says, and a run with them against one without."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import sdjax.settings
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.methods.clip import Clip
from sdjax.methods.full import Full
from sdjax.methods.vae import Vae
from sdjax.sampling import memory
from sdjax.training import checks, fit
from sdjax.training.begin import begin
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train

ROOT = Path(__file__).parents[1]
RUN = Train(
    model="random:tiny", method=Full(("unet",), "attn2"), steps=2, log=1, checkpoint=0, optim=Optim(lr=1e-3),
    data=Data(path="pocketland", size=32, batch=4, source=Pocketland(count=8)),
)  # fmt: skip


@pytest.fixture(scope="module")
def begun():
    return begin(RUN)


def test_a_run_that_fits_is_the_run_with_the_settings_that_it_says(tmp_path, capsys):
    train(dataclasses.replace(RUN, fit="8GB"), tmp_path / "fit")
    assert "fit=8GB: rows in 1 x 4, adamw, remat=False, compute and frozen in bfloat16" in capsys.readouterr().out
    train(dataclasses.replace(RUN, compute="bfloat16", frozen="bfloat16"), tmp_path / "plain")
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("fit", "plain")
    ]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="fit='7GB': expected one of"):
        dataclasses.replace(RUN, fit="7GB")


def test_the_fastest_way_that_fits_is_taken(begun, monkeypatch):
    trained, frozen, data, _ = begun
    monkeypatch.setattr(fit, "SHARE", 1.0)
    settings = fit.typed(dataclasses.replace(RUN, fit="8GB"))
    needs = {}
    for made in fit._ways(settings):
        key = made.optim.kind, made.remat, made.optim.accumulate
        needs[key] = fit.bytes_of(made, trained, frozen, data.size)
    kinds = [("adamw", False), ("adamw", "products"), ("adamw", True), ("adafactor", "products"), ("adafactor", True)]
    assert list(needs) == [(*kind, n) for kind in kinds for n in (1, 2, 4)]
    for limit in sorted(needs.values()):
        monkeypatch.setattr(fit, "GB", limit / 8 * (1 + 1e-9))
        made, said = fit.fitted(settings, trained, frozen, data.size)
        chosen = made.optim.kind, made.remat, made.optim.accumulate
        assert chosen == next(key for key, needed in needs.items() if needed <= limit * (1 + 1e-9))
        assert made.data == settings.data and said.startswith("fit=8GB: rows in ")
    monkeypatch.setattr(fit, "GB", min(needs.values()) / 8 * 0.99)
    with pytest.raises(ValueError, match="^fit='8GB': this run needs at least about .* GB; expected a larger"):
        fit.fitted(settings, trained, frozen, data.size)
    whole = dataclasses.replace(settings, method=Clip())
    assert {made.optim.accumulate for made in fit._ways(whole)} == {1}
    prodigy = dataclasses.replace(settings, optim=Optim("prodigy", 1.0))
    assert {made.optim.kind for made in fit._ways(prodigy)} == {"prodigy"}


def test_auto_takes_the_memory_that_is_free_and_that_the_run_holds(begun, monkeypatch):
    trained, frozen, data, _ = begun
    settings = fit.typed(dataclasses.replace(RUN, fit="auto"))
    held = sum(x.nbytes for x in jax.tree.leaves((trained, frozen)) if isinstance(x, jax.Array))
    needed = [fit.bytes_of(made, trained, frozen, data.size) / fit.SHARE for made in fit._ways(settings)]
    monkeypatch.setattr(memory, "available", lambda: int(needed[0] - held) + 2)
    made, said = fit.fitted(settings, trained, frozen, data.size)
    assert (made.remat, made.optim) == (False, settings.optim)
    assert said.startswith("fit=auto: rows in 1 x 4, ") and said.endswith(f" of {needed[0] / fit.GB:.1f} GB")
    monkeypatch.setattr(memory, "available", lambda: int(needed[0] - held) - 2)
    assert fit.fitted(settings, trained, frozen, data.size)[0] != made
    monkeypatch.setattr(memory, "available", lambda: int(min(needed) - held) - 2)
    with pytest.raises(
        ValueError, match="^fit='auto': this run needs at least about .* GB of .* GB; expected a larger"
    ):
        fit.fitted(settings, trained, frozen, data.size)
    monkeypatch.setattr(memory, "available", lambda: None)
    with pytest.raises(ValueError, match="^fit='auto': this device does not tell its memory; expected a limit such"):
        fit.fitted(settings, trained, frozen, data.size)


@pytest.mark.parametrize("method", [Vae(), Clip()])
def test_training_without_the_unet_is_refused(method):
    run = dataclasses.replace(RUN, fit="8GB", method=method)
    with pytest.raises(ValueError, match=f"^fit='8GB': it estimates .* not of {type(method).__name__}; expected ''"):
        checks.alone(run)


def test_weights_that_a_step_does_not_look_at_stay_on_the_host(begun):
    _, frozen, _, _ = begun

    def step(state, frozen, batch):
        return state + sum(jax.numpy.sum(x) for x in jax.tree.leaves(frozen.parts["text_encoder"]))

    kept = fit.aside(step, 1.0, frozen, {})
    assert jax.tree.structure(kept) == jax.tree.structure(frozen)
    for part, tree in kept.parts.items():
        assert {isinstance(x, np.ndarray) for x in jax.tree.leaves(tree)} <= {part != "text_encoder"}
    assert jax.jit(step)(1.0, kept, {}) == jax.jit(step)(1.0, frozen, {})


@pytest.mark.parametrize("recipe", ["lora", "dreambooth", pytest.param("e4t_tune", marks=pytest.mark.slow)])
def test_the_account_is_the_compilers(recipe, monkeypatch):
    """Of docs/fit_memory.json, within 8 percent; and that is within what the recipe was to fit into."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    fit_memory = importlib.import_module("fit_memory")
    found = json.loads((ROOT / "docs/fit_memory.json").read_text())[recipe]
    given = [*fit_memory.GIVEN[recipe], "data.path=photo.png"]
    settings = sdjax.settings.load(ROOT / f"configs/{recipe}.py", given)
    _, _, _, chosen, account = importlib.import_module("shapes").program(settings)
    assert chosen == found["chosen"]
    assert account == pytest.approx(found["bytes"], rel=0.08)
    assert found["bytes"] <= fit.GB * int(settings.fit.removesuffix("GB"))


def test_a_batch_that_the_devices_do_not_divide_is_refused_as_that(tmp_path):
    run = dataclasses.replace(RUN, fit="8GB", parallel="pmap", data=dataclasses.replace(RUN.data, batch=3))
    with pytest.raises(ValueError, match="data.batch=3: parallel='pmap' spreads it over 4 devices, which must divide"):
        train(run, tmp_path)
