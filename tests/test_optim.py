"""Optimizers against optax's own for whole trees, PyTorch's and the papers; Muon in whatever stacks kernels come."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax import contrib
from optax.contrib import MuonDimensionNumbers, muon, scale_by_muon

from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.settings import SettingError, override
from sdjax.training import loop, optim, ready, schedules
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.muon import orthogonal
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import initial_state

SHAPES = {
    "a.kernel": (6, 8), "b.kernel": (6, 8), "c.kernel": (3, 3, 4, 8), "d.kernel": (36, 8), "e.kernel": (5, 6, 8),
    "f.kernel": (5, 1, 8), "a.bias": (8,), "rows": (2, 8),
}  # fmt: skip


def gradients(step):
    random = np.random.default_rng(step)
    return {name: jnp.asarray(random.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def numbers(tree):
    """Returns the matrices in SHAPES as optax names them; None: not Muon's."""
    own = {2: MuonDimensionNumbers(0, 1), 3: MuonDimensionNumbers(1, 2), 4: MuonDimensionNumbers((0, 1, 2), 3)}
    matrices = {name for name, shape in SHAPES.items() if name.endswith("kernel") and shape[1] > 1}
    return {name: own[len(SHAPES[name])] if name in matrices else None for name in tree}


def after(tx, steps=4):
    params = jax.tree.map(jnp.zeros_like, gradients(0))
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("small", [0, 1 << 24])
def test_muon_is_optaxs_in_stacks_and_one_by_one(small, monkeypatch):
    monkeypatch.setattr("sdjax.training.muon.SMALL", small)
    ours = after(optim.optimizer(Optim(kind="muon", lr=0.02, weight_decay=0.0, betas=(0.8, 0.99), clip=None), 4)[0])
    matrices = after(muon(0.02, beta=0.8, consistent_rms=0.2, muon_weight_dimension_numbers=numbers))
    others = after(optax.adam(0.02, 0.8, 0.99))
    for name, matrix in numbers(SHAPES).items():
        theirs = others if matrix is None else matrices
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, err_msg=name)


def test_muon_is_pytorchs():
    """One step: from the second on PyTorch's momentum, whose start it does not correct, points elsewhere."""
    gradient = gradients(0)["d.kernel"]
    tx = optim.optimizer(Optim(kind="muon", lr=0.02, weight_decay=0.0, clip=None), 4)[0]
    ours = tx.update({"d.kernel": gradient}, tx.init({"d.kernel": gradient}))[0]["d.kernel"]
    weight = torch.nn.Parameter(torch.zeros(8, 36))
    weight.grad = torch.tensor(np.asarray(gradient).T)
    torch.optim.Muon([weight], lr=0.02, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    theirs = weight.detach().numpy().T
    np.testing.assert_allclose(ours, theirs, atol=0.03 * np.abs(theirs).max())  # PyTorch iterates in bfloat16
    assert np.sqrt(np.mean(np.square(ours))) == pytest.approx(0.2 * 0.02, rel=0.3)


def test_muon_of_matrices_of_low_rank_is_optaxs():
    """Products of X X^T alone lose what rounding hides in it; the iterations enlarge that."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((3, 64, 4)) @ random.standard_normal((3, 4, 200)), jnp.float32)
    tx = scale_by_muon(weight_dimension_numbers={"a": MuonDimensionNumbers(1, 2)})
    theirs = tx.update({"a": x}, tx.init({"a": x}))[0]["a"]
    ours = orthogonal({"a": x / jnp.linalg.norm(x, axis=(1, 2), keepdims=True)})["a"] / (0.2 * 200**0.5)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # singular values are about 1


def test_muon_takes_rates_by_name():
    def moved(rates):
        return after(optim.optimizer(Optim(kind="muon", lr=0.02, weight_decay=0.0, rates=rates), 1)[0], 1)

    plain, slow = moved(()), moved((("^a", 0.25),))
    for name in SHAPES:
        np.testing.assert_allclose(slow[name], plain[name] * (0.25 if name[0] == "a" else 1), rtol=1e-5)


def test_weights_that_an_optimizer_evaluates_are_averaged_and_exported(monkeypatch, tmp_path):
    """Schedule-free: what is looked at is not what the gradient is taken at."""
    from optax.contrib import schedule_free_adamw, schedule_free_eval_params

    tx = schedule_free_adamw(1e-2)
    monkeypatch.setattr(ready, "optimizer", lambda settings, steps, minutes: (tx, schedule_free_eval_params))
    data = Data(path="pocketland", size=32, batch=2, source=Pocketland(count=8), word="<new>")
    run = Train(
        model="random:tiny", method=TextualInversion("<new>", "face"), data=data, steps=3, checkpoint=3, ema=0.5
    )
    states = []
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, state, *_, **__: states.append(jax.tree.map(np.asarray, state))
    )
    joined = loop.train(dataclasses.replace(run, ema=0.0), tmp_path / "plain")
    wanted = schedule_free_eval_params(states[-1]["opt"], states[-1]["trained"])["rows"]["text_encoder"]
    np.testing.assert_allclose(joined.rows("<new>")["text_encoder"], wanted, rtol=1e-6)
    assert np.abs(wanted - states[-1]["trained"]["rows"]["text_encoder"]).max() > 1e-4
    first = states[-1]["trained"]["rows"]["text_encoder"]
    loop.train(run, tmp_path / "averaged")
    np.testing.assert_array_equal(states[-1]["trained"]["rows"]["text_encoder"], first)
    distance = [np.abs(states[-1]["ema"]["rows"]["text_encoder"] - other).max() for other in (wanted, first)]
    assert distance[0] < distance[1]


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        (Optim("lion", 1e-2, betas=(0.9, 0.99)), lambda: optax.lion(1e-2, 0.9, 0.99, weight_decay=0.01)),
        (
            Optim("prodigy", 1.0, "linear", warmup=2, growth=1e3),  # so that its estimate moves within few steps
            lambda: contrib.prodigy(
                optax.join_schedules([optax.linear_schedule(0.0, 1.0, 2), optax.linear_schedule(1.0, 0.0, 4)], [2]),
                estim_lr_coef=1e3,
                weight_decay=0.01,
                safeguard_warmup=True,
            ),
        ),
        (Optim("adopt", 1e-2, weight_decay=0.0, betas=(0.9, 0.9999)), lambda: contrib.adopt(1e-2)),
        (Optim("ademamix", 1e-2), lambda: contrib.ademamix(1e-2, weight_decay=0.01)),
        (
            Optim("dadapt_adamw", 1.0, weight_decay=0.1, schedule="linear"),
            lambda: contrib.dadapt_adamw(optax.linear_schedule(1.0, 0.0, 6), weight_decay=0.1),
        ),
        (
            Optim("schedule_free", 1e-2, weight_decay=0.0, warmup=2),
            lambda: contrib.schedule_free_adamw(1e-2, warmup_steps=2),
        ),
    ],
)
def test_kinds_are_optaxs(settings, theirs):
    settings = dataclasses.replace(settings, clip=None)
    ours, theirs = after(optim.optimizer(settings, 6)[0], 6), after(theirs(), 6)
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-9, err_msg=name)
        assert np.abs(ours[name]).max() > 0


@pytest.mark.parametrize(
    ("name", "settings", "theirs"),
    [
        ("cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
        ("cosine_with_restarts", {}, {}),
        ("polynomial", {"power": 2.0, "end": 1e-4}, {"power": 2.0}),  # their last rate is 1e-7
        ("cosine", {}, {}),
        ("linear", {}, {}),
    ],
)
def test_schedules_are_diffusers(name, settings, theirs):
    """From the first step to behind the last, with a warmup."""
    from diffusers.optimization import get_scheduler

    ours = optim.rate(Optim(lr=1e-3, schedule=name, warmup=4, **settings), 23)
    weights = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    there = get_scheduler(name, weights, num_warmup_steps=4, num_training_steps=23, **theirs)
    for step in range(24):
        assert float(ours(step)) == pytest.approx(there.get_last_lr()[0], rel=1e-5, abs=1e-10), step
        weights.step()
        there.step()


def test_lists_of_rates_are_a1111s():
    """By its words: "to have lr of 0.001 until step 100, 0.00001 until 1000, and 1e-5 until 10000"."""
    text = "0.005:3, 1e-3:5,1e-5"
    wanted = [5e-3] * 3 + [1e-3] * 2 + [1e-5] * 4
    found = optim.rate(Optim(lr=text), 9)
    np.testing.assert_allclose([float(found(step)) for step in range(9)], wanted, rtol=1e-6)
    np.testing.assert_allclose([float(schedules.rate(Optim(lr=text), jnp.int32(n), 5)) for n in range(9)], wanted)
    for same in ("0.005:3, 1e-3:5, 1e-5:-1", "0.005:3, 1e-3:5, 1e-5:10000,"):
        assert schedules.listed(same) == schedules.listed(text)
    assert float(optim.rate(Optim(lr="0.5"), 9)(7)) == 0.5
    moved = after(optim.optimizer(Optim("sgd", lr="1:1, 0.5", clip=None, weight_decay=0.0), 2)[0], 2)["rows"]
    np.testing.assert_allclose(moved, -gradients(0)["rows"] - 0.5 * gradients(1)["rows"], rtol=1e-5)
    for wrong in ("fast", "", "1:2:3", "1e-3:100, 1e-4:50", "1e-3, 1e-4", "-1:5, 1", "nan", "1e-3:0, 1"):
        with pytest.raises(SettingError, match="^lr=.*: expected a number from 0, or rates until rising steps"):
            Optim(lr=wrong)
    for more in ({"schedule": "cosine"}, {"warmup": 3}):
        with pytest.raises(SettingError, match=f"^{next(iter(more))}=.* with a list of rates as lr"):
            Optim(lr=text, **more)
    for kind in ("prodigy", "schedule_free"):
        with pytest.raises(SettingError, match=f"^lr=.*expected one number with kind={kind}"):
            Optim(kind, lr=text)
    assert override(Optim(), ["lr=0.005:100, 1e-3:1000"]).lr == "0.005:100, 1e-3:1000"
    assert override(Optim(), ["lr=5"]).lr == 5.0 and type(override(Optim(), ["lr=5"]).lr) is float


def test_lion_is_the_papers():
    """Chen et al. 2023, algorithm 2, in numpy."""
    weight = moment = np.zeros(SHAPES["d.kernel"], np.float32)
    for step in range(4):
        gradient = np.asarray(gradients(step)["d.kernel"])
        weight = weight - 1e-2 * (np.sign(0.9 * moment + 0.1 * gradient) + 0.01 * weight)
        moment = 0.99 * moment + 0.01 * gradient
    ours = after(optim.optimizer(Optim("lion", 1e-2, betas=(0.9, 0.99), clip=None), 4)[0])
    np.testing.assert_allclose(ours["d.kernel"], weight, rtol=1e-5, atol=1e-7)


def test_schedule_free_is_evaluated_at_its_average():
    """Defazio et al. 2024, equations 1 to 3 with Adam's scale, in numpy; also where weights come as one vector."""
    tx, evaluate = optim.optimizer(Optim("schedule_free", 1e-2, weight_decay=0.0, clip=None), 4)
    params = jax.tree.map(jnp.ones_like, gradients(0))
    state = tx.init(params)
    x = z = np.ones(SHAPES["d.kernel"])
    second = 0.0
    for step in range(4):
        updates, state = tx.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        gradient = np.asarray(gradients(step)["d.kernel"], np.float64)
        second = 0.999 * second + 0.001 * gradient**2
        z = z - 1e-2 * gradient / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        x = x + (z - x) / (step + 1)
    np.testing.assert_allclose(evaluate(state, params)["d.kernel"], x, rtol=1e-5)
    assert np.abs(params["d.kernel"] - x).max() > 1e-4  # not where the gradient is taken


def test_kinds_that_need_other_settings_say_so():
    with pytest.raises(ValueError, match="^lr=0.0001: .*expected about 1 with kind=prodigy"):
        Optim("prodigy")
    with pytest.raises(ValueError, match="^schedule='cosine': expected 'constant' with kind=schedule_free"):
        Optim("schedule_free", schedule="cosine")


def test_gradients_and_rates_are_told_by_group():
    tree = {"unet": {"a": jnp.full(4, 3.0)}, "text_encoder": {"b": jnp.full(9, 1.0)}}
    tx, _ = optim.optimizer(Optim("prodigy", 1.0), 4)
    told = optim.gradients(tree, tx.init(tree))
    assert {name: pytest.approx(float(value)) for name, value in told.items()} == {
        "gradient": 45**0.5, "gradient.unet": 6.0, "gradient.text_encoder": 3.0, "found": 1e-6,
    }  # fmt: skip
    assert set(optim.gradients({"rows": jnp.ones(3)}, ())) == {"gradient"}
    assert optim.rates(Optim(rates=(("^text", 0.5),)), 1e-3) == {"rate": 1e-3, "rate.^text": 5e-4}


def test_a_states_first_weights_are_those_of_the_split_and_nothing_is_shared():
    """Not copied once more; and an optimizer that keeps the weights themselves keeps its own copy, for donation."""
    from optax.contrib import schedule_free_adamw

    trained = {"rows": jnp.ones((4, 3))}
    state = initial_state(trained, schedule_free_adamw(1e-2), 0.9)
    assert state["trained"]["rows"] is trained["rows"]
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size == 12]
    assert len(places) == len(set(places)) >= 4


def test_the_average_of_equal_numbers_is_that_number():
    """A run at rate 0 exports the model that it began with."""
    x = {"a": gradients(0), "b": gradients(1)}
    average = jax.jit(lambda one, other, step: optim.moving_average(one, other, 0.999, step))
    for step in (0, 1, 7, 20_000):
        for one, other in zip(*map(jax.tree.leaves, (average(x, x, step), x)), strict=True):
            np.testing.assert_array_equal(one, other)
    moved = average(gradients(0), gradients(1), 8)["rows"]  # at step 8 the decay is 9 / 18
    np.testing.assert_allclose(moved, (gradients(0)["rows"] + gradients(1)["rows"]) / 2, rtol=1e-6)
