"""What every method owes: join after split changes nothing, gradients reach what is trained and nothing else."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdjax
from sdjax import methods, tasks, trees
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.methods.adapter import Adapter
from sdjax.methods.chain import Chain
from sdjax.methods.clip import Clip
from sdjax.methods.controlnet import ControlNet
from sdjax.methods.custom_diffusion import CustomDiffusion
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.methods.hypernetwork import Hypernetwork
from sdjax.methods.lora import Lora
from sdjax.methods.method import Method
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.methods.vae import Vae
from sdjax.runtime import mesh
from sdjax.settings import SettingError
from sdjax.training.begin import begin
from sdjax.training.settings import Train
from sdjax.training.step import default_loss, initial_state, make_step

METHODS = {
    "full": Full(("unet", "text_encoder")),
    "full by name": Full(("unet",), r"attn2\.to_(k|v)\.kernel$"),
    "textual inversion": TextualInversion("<cat>", "cat", 2),
    "e4t": E4T(penalty=1e-3),
    "e4t level vision": E4T(features="level", vision=True),
    "e4t tuning": Chain((E4T(), Full())),
    "pivotal": Chain((TextualInversion("<cat>", "cat"), Full(("unet",), "attn2"))),
    "lora": Lora(2, 1.0, text_encoder=True, convolutions=2, ranks=((r"attn1", 3), (r"up_blocks\.1", 0))),
    "pissa": Lora(2, init="pissa", targets=r"^unet\.mid_block"),
    "dora": Lora(2, algo="dora", targets=r"^unet\.(mid_block|conv_)"),
    "loha": Lora(2, algo="loha", targets=r"^unet\.(mid_block|conv_)"),
    "lokr": Lora(1, algo="lokr", targets=r"^unet\.(mid_block|conv_)"),
    "oft": Lora(4, algo="oft", targets=r"^unet\.(mid_block|conv_in)"),
    "lora and words": Chain((TextualInversion("<cat>", "cat"), Lora(2, targets="attn2"))),
    "custom diffusion": Chain((TextualInversion("<cat>", "cat"), CustomDiffusion())),
    "decoder": Vae(recon="l2", pattern=r"^(decoder|post_quant_conv)\."),
    "vae": Vae(recon="l2", critic=0.5, critic_start=0, critic_channels=8, critic_layers=2),
    "clip": Clip(),
    "controlnet": ControlNet(),
    "hypernetwork": Hypernetwork((1, 2, 2, 1), "mish", layer_norm=True, dropout=(0, 0.3, 0.2, 0)),
    "words and hypernetwork": Chain((TextualInversion("<cat>", "cat"), Hypernetwork())),
    "hypernetwork and lora": Chain((Hypernetwork(), Lora(rank=2, alpha=2.0))),
    "controlnet on inpainting": ControlNet(),
    "lora on upscaler": Lora(rank=2, alpha=2.0),
}
TASKS = {"controlnet on inpainting": "inpainting", "lora on upscaler": "upscaling"}  # else text to image
SIZE = 4
QUICK = [("textual inversion", "pmap")]  # of modes, beside those that `make test-slow` runs
MODES = ("mesh:data=2,fsdp=2", "pmap")


def task_of(name):
    return tasks.known()[TASKS.get(name, "text2img")]


@functools.cache
def model(name=""):
    """Returns the tiny model, prepared for the task of a method's name."""
    return task_of(name).prepare(pipeline.load("random:tiny"), jax.random.key(3))


def batch(sd, size=SIZE):
    random = np.random.default_rng(0)
    words = sorted(sd.words) or ["face"]
    return {
        "pixels": random.uniform(-1, 1, (size, 32, 32, 3)).astype(np.float32),
        "concept": random.uniform(-1, 1, (size, 32, 32, 3)).astype(np.float32),
        "control": {"hint": random.random((size, 32, 32, 3), np.float32)},
        "ids": sd.tokenize([f"a photo of a {words[i % len(words)]}" for i in range(size)]),
        "index": np.arange(size, dtype=np.int32),
        "weight": np.ones(size, np.float32),
    }


def loss_of(name):
    return METHODS[name].loss or default_loss(METHODS[name], Train(method=METHODS[name]), task_of(name))


def noised(tree, scale=0.02):
    random = np.random.default_rng(7)  # on the host: nothing to compile per shape
    return jax.tree.map(
        lambda x: jnp.asarray(x + np.float32(scale) * random.standard_normal(x.shape, np.float32)), tree
    )


@pytest.fixture(params=METHODS, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def parts(name):
    return METHODS[name].split(model(name), jax.random.key(1))


def test_every_method_is_among_these():
    parts = [part for method in METHODS.values() for part in (method.parts if isinstance(method, Chain) else (method,))]
    assert {type(part) for part in parts} | {Chain} == set(methods.known().values())


def test_join_after_split_changes_nothing(name, parts):
    trained, frozen = parts
    before, after = model(name), METHODS[name].join(frozen, trained)
    prompts = before.tokenize(["a photo of a face", "a cat in the snow"])
    z, t = jax.random.normal(jax.random.key(2), (2, 16, 16, 4)), jnp.array([10.0, 700.0])
    rows = jax.tree.map(lambda x: x[:2], batch(before))
    more = {name: rows[name] for name in ("concept", "control")}
    told = task_of(name).inputs(before, rows, jax.random.key(5))
    run = jax.jit(lambda sd: (sd.denoise(z, t, told.over(sd.condition(prompts)).with_own(**more))[0], sd.decode(z)))
    for one, other in zip(run(before), run(after), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(one).max()))


def test_training_moves_all_that_is_trained_and_nothing_else(name, parts):
    """Plain gradient steps, so that what has no gradient stays bit for bit."""
    method, (trained, frozen) = METHODS[name], parts
    trained, before = noised(trained), trees.digest(frozen)
    tx, rows = optax.sgd(1.0), batch(frozen)
    step = jax.jit(make_step(method, tx, jax.random.key(4), loss=loss_of(name)))
    state, metrics = step(initial_state(trained, tx), frozen, rows)
    assert np.isfinite(float(metrics["loss"])) and int(state["step"]) == 1
    after = trees.flatten(state["trained"])
    idle = [name for name, x in trees.flatten(trained).items() if np.array_equal(x, after[name])]
    # A key's bias moves all scores of a query alike, which the softmax forgets; rows of words that do not occur stay.
    forgotten = r"k_proj\.bias$|to_k\.bias$|to_k\.\d+\.bias$|token_embedding"
    idle = [name for name in idle if not re.search(forgotten, name)]
    # The two halves of the hinge loss cancel on the last bias as long as both are active.
    unread = r"post_layernorm|visual_projection|layers\.2\." if isinstance(method, E4T) else r"^critic\.main\.8\.bias$"
    assert [name for name in idle if not re.search(unread, name)] == []
    assert trees.digest(frozen) == before


@pytest.mark.parametrize("name", ["textual inversion", pytest.param("e4t tuning", marks=pytest.mark.slow)])
def test_microbatches_give_the_gradient_of_the_batch(name):
    method = METHODS[name]
    trained, frozen = method.split(model(), jax.random.key(1))
    tx, rows = optax.sgd(0.1), batch(frozen)
    states = []
    for accumulate in (1, 2):
        step = make_step(
            method, tx, jax.random.key(4), loss=default_loss(method, Train(method=method)), accumulate=accumulate
        )
        states.append(jax.jit(step)(initial_state(trained, tx), frozen, rows)[0]["trained"])
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "hypernetwork"])
def test_loss_of_an_example_does_not_depend_on_its_batch(name):
    method = METHODS[name]
    trained, frozen = method.split(model(), jax.random.key(1))
    rows = batch(frozen)
    loss, own = jax.jit(default_loss(method, Train())), noised(trained)
    value = lambda rows: float(loss(frozen, own, rows, jax.random.key(3), jnp.int32(0))[0])  # noqa: E731
    alone = [value(jax.tree.map(lambda x, i=i: x[i : i + 1], rows)) for i in range(SIZE)]
    assert value(rows) == pytest.approx(np.mean(alone), rel=1e-5)


@functools.cache
def stepped(name, mode):
    """Returns (loss, trained) after one plain gradient step of a method in a parallel mode."""
    method, tx = METHODS[name], optax.sgd(0.1)
    trained, frozen = method.split(model(name), jax.random.key(1))
    step = make_step(method, tx, jax.random.key(4), loss=loss_of(name))
    place, run = mesh.compile(step, mode, SIZE)
    state, rows = place.state(initial_state(noised(trained), tx)), place.batch(batch(frozen))
    state, metrics = run(state, place.frozen(frozen), rows)
    return float(metrics["loss"]), jax.device_get(place.gather(state)["trained"])


@pytest.mark.parametrize(
    ("of", "mode"),
    [pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.slow)
     for name in METHODS for mode in MODES],
)  # fmt: skip
def test_parallel_modes_take_the_step_of_one_device(of, mode):
    (one, first), (other, second) = stepped(of, "single"), stepped(of, mode)
    assert other == pytest.approx(one, rel=2e-5)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(x).max()))


def test_full_must_come_last_in_a_chain():
    with pytest.raises(ValueError, match="Full takes weights away"):
        Chain((Full(), E4T()))
    with pytest.raises(ValueError, match="Clip has a loss of its own; it trains alone"):
        Chain((TextualInversion("<new>"), Clip()))


CHANGED = r"method.parts=.*: CustomDiffusion \(parts.0\) and Lora \(parts.1\) both change unet.*attn2.to_"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            (Lora(rank=2, targets=r"attn2\.to_k"), Lora(rank=2, targets="attn2")),
            r"Lora \(parts.0\) and Lora \(parts.1\)",
        ),
        ((CustomDiffusion(), Lora(rank=2, targets=r"attn2\.to_k")), CHANGED),
        ((CustomDiffusion(query=True), Lora(rank=2)), CHANGED),
    ],
)
def test_parts_of_a_chain_that_change_one_weight_are_refused_at_the_start(parts, message):
    data = Data(path="pocketland", size=32, batch=4, source=Pocketland(count=16))
    with pytest.raises(SettingError, match=f"{message}.*; expected parts that change different weights"):
        begin(Train(model="random:tiny", method=Chain(parts), data=data))
    Chain((*parts, Full(("unet",), r"^conv_in\."))).split(sdjax.load("random:tiny"))  # whose model holds all of them


def test_two_parts_with_one_word_are_refused():
    with pytest.raises(ValueError, match="method.parts: two parts train the word '<cat>'; expected one"):
        Chain((TextualInversion("<cat>"), TextualInversion("<Cat>")))


class Hooked(Method):
    """Learns a hook, and data for the model's reference."""

    def adapter(self, frozen, trained):
        return Adapter(hook=object(), own={"mine": 1})


class Owning(Method):
    def adapter(self, frozen, trained):
        return Adapter(conditioner=object(), own={"other": 2})


def test_what_parts_learn_is_kept_whole_or_the_chain_has_no_adapter():
    sd = sdjax.load("random:tiny")
    both = Chain((Hooked(), Owning())).adapter(sd, {"0": {}, "1": {}})
    assert both.hook is not None and both.conditioner is not None and both.own == {"mine": 1, "other": 2}
    assert Chain((Hooked(), Hooked())).adapter(sd, {"0": {}, "1": {}}) is None
