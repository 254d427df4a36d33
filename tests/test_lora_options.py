"""What is random while LoRA trains, the largest norm of its changes, and PiSSA's start in files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import assert_same, assert_same_picture, fresh, made
from test_laws import noised

from sdjax import trees
from sdjax.formats.adapters import kinds
from sdjax.methods import deltas
from sdjax.methods.branches import Branches
from sdjax.methods.deltas.layer import Draw, Drop, Layer
from sdjax.methods.lora import Lora
from sdjax.models.hooks import apply
from sdjax.models.layers import Dense

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
IN, OUT, RANK, ROWS, PLACES = 6, 8, 4, 4000, 2
ALGOS = deltas.algorithms()


@functools.cache
def layer(algo):
    """Returns (factors with scale, the layer, an input [1 places in], what the layer makes of it)."""
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.standard_normal((IN, OUT), np.float32))
    method = Lora(RANK, 2.0, algo)
    f = noised(deltas.named(algo).start(kernel.T, RANK, Draw(random), method), 0.3)
    x = jnp.asarray(random.standard_normal((1, PLACES, IN), np.float32))
    return method._whole(f), Layer(kernel, jnp.float32), x, x @ kernel


@functools.cache
def moved(algo, units=0.0, ranks=0.0, rows=ROWS):
    """Returns what the change adds for `rows` examples of one input [rows places out], each with a key of its own."""
    f, own, x, y = layer(algo)
    keys = jax.random.split(jax.random.key(0), rows)
    repeated = (jnp.broadcast_to(a, (rows, *a.shape[1:])) for a in (x, y))
    return np.asarray(deltas.named(algo).run(f, *repeated, own, Drop(keys, units, ranks)))


@pytest.mark.parametrize(("algo", "rates"), [("lora", (0.5, 0.0)), *((algo, (0.0, 0.5)) for algo in ALGOS)])
def test_dropout_leaves_the_mean(algo, rates):
    """A half of the numbers between the factors, or of ranks; what is kept counts twice."""
    f, own, x, y = layer(algo)
    whole, found = np.asarray(deltas.named(algo).run(f, x, y, own, Drop())), moved(algo, *rates)
    deviation = found.std(0)
    assert deviation.max() > 0.1 * np.abs(whole).max()
    assert (np.abs(found.mean(0) - whole[0]) <= 5 * deviation / ROWS**0.5 + 1e-6).all()


def test_dropout_of_ranks_is_alike_at_all_places_and_that_of_numbers_is_not():
    f, own, x, _ = layer("lora")
    inner = np.asarray(x @ f["down"].reshape(RANK, IN).T)[0]  # [places r]
    up = np.asarray(f["scale"] * f["up"].reshape(OUT, RANK))
    for rates, alike in (((0.5, 0.0), False), ((0.0, 0.5), True)):
        kept = np.einsum("or,bpo->bpr", np.linalg.pinv(up).T, moved("lora", *rates)) / (2 * inner[None])
        np.testing.assert_allclose(kept, kept.round(), atol=1e-3)  # of each rank all or nothing
        assert set(np.unique(kept.round())) == {0.0, 1.0} and kept.mean() == pytest.approx(0.5, abs=0.02)
        assert np.array_equal(kept[:, 0].round(), kept[:, 1].round()) == alike


def test_dropout_of_modules_is_all_or_nothing_and_of_the_example():
    f, own, x, y = layer("lora")
    network, params = Dense(OUT, False), {"kernel": own.kernel}
    keys = jax.random.split(jax.random.key(1), 64)

    def run(keys, rate=0.25):
        rows = jnp.broadcast_to(x, (64, PLACES, IN))
        return np.asarray(apply("unet", network, params, (Branches({"unet": {"": f}}, keys, modules=rate),), rows))

    whole, found, plain = run(keys, 0.0)[0], run(keys), np.asarray(y)[0]
    on = np.array([np.allclose(row, whole, atol=1e-5) for row in found])
    assert all(np.allclose(row, plain, atol=1e-5) for row in found[~on]) and 8 <= (~on).sum() <= 26
    np.testing.assert_array_equal(run(keys[::-1])[::-1], found)  # an example's key decides, whatever its place
    np.testing.assert_array_equal(run(None), run(None, 0.0))  # nothing is dropped while pictures are made


def test_training_draws_what_is_dropped_and_sampling_does_not():
    method = Lora(2, dropout=0.1, rank_dropout=0.2, module_dropout=0.3)
    sd = made("sd1")[1]
    trained, frozen = Lora(2, targets=r"^unet\.mid_block.*to_q").split(sd)
    hook = method.join(frozen, trained, jax.random.split(jax.random.key(0), 3)).hooks[-1]
    assert (hook.units, hook.ranks, hook.modules, len(hook.keys)) == (0.1, 0.2, 0.3, 3)
    assert method.join(frozen, trained).hooks[-1].keys is None
    assert Lora(2).join(frozen, trained, jax.random.key(0)).hooks[-1].keys is None


@pytest.mark.parametrize("algo", ALGOS)
def test_no_change_is_larger_than_max_norm(algo):
    """|D| of LoRA and its like, |P| of OFT; what is smaller stays, and every factor is shrunk alike."""
    kind = deltas.named(algo)
    f = {name: x for name, x in layer(algo)[0].items() if name not in ("scale", "alpha", "constraint")}
    size = float(kind.size(Lora(RANK, 2.0, algo)._whole(f)))
    for most in (0.3 * size, 2 * size):
        method = Lora(RANK, 2.0, algo, max_norm=most)
        found = method.project({"unet": {"a": f}})["unet"]["a"]
        assert float(kind.size(method._whole(found))) == pytest.approx(min(most, size), rel=1e-4)
        ratios = [
            float(jnp.linalg.norm(found[name]) / jnp.linalg.norm(f[name])) for name in f if name in kind.multiplied
        ]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-5)
        if algo == "lora":  # sd-scripts: both factors times the root of max / |a B A|
            change = 0.5 * np.asarray(f["up"]).reshape(OUT, RANK) @ np.asarray(f["down"]).reshape(RANK, IN)
            assert ratios[0] == pytest.approx(min(1, most / np.linalg.norm(change)) ** 0.5, rel=1e-4)
    assert Lora(RANK, algo=algo).project is None


def test_pissa_in_files_is_the_change_since_the_start(tmp_path):
    """Twice the rank, a B A - a B0 A0: on a base that is whole, as in other programs, it gives the trained model."""
    method = Lora(
        3,
        6.0,
        init="pissa",
        targets=r"^unet\.mid_block.*(attn1\.to_(q|out)|proj_in)|^text_encoder.*layers\.0\.self_attn",
    )
    sd = made("sd1")[1]
    start, frozen = method.split(sd)
    weights, module = trees.flatten(sd.parts["unet"]), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    values = np.linalg.svd(np.asarray(weights[f"{module}.kernel"]), compute_uv=False)
    f = start["unet"][module]
    np.testing.assert_allclose(np.linalg.svd(2 * f["up"] @ f["down"], compute_uv=False)[:3], values[:3], rtol=1e-4)
    changes = method.adapter(frozen, start).edits["unet"]
    assert all(float(jnp.abs(edit.change(weights[name].T)).max()) < 1e-5
               for name, edit in changes.items() if weights[name].ndim == 2)  # fmt: skip
    trained = noised(start, 0.1)
    adapter = method.adapter(frozen, trained)
    path = kinds.known()["kohya"].write(adapter, tmp_path)
    theirs = fresh("sd1")
    theirs.load_lora_weights(path.parent, weight_name=path.name)
    joined = method.join(frozen, trained).fold()
    assert_same(joined, theirs, moved=sd)
    assert_same_picture(joined, theirs)
    assert adapter.edits["unet"][f"{module}.kernel"].factors["down"].shape[0] == 6
