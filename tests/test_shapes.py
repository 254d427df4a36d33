"""The contracts fit what comes: members of other shapes than the package's own, each a class here and nothing else.

Each computes as the model did before it learned, trains where it should and nowhere else, and makes other pictures
than the plain model.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import struct
from optax.contrib import schedule_free, schedule_free_eval_params

import sdjax
from sdjax import tasks, trees
from sdjax.diffusion import wrappers
from sdjax.formats import pipeline
from sdjax.formats.storage import parameters
from sdjax.methods.full import Full
from sdjax.methods.method import Method
from sdjax.models.cond import Cond
from sdjax.models.conditioner import Conditioner
from sdjax.models.controlnet import ControlNet, ControlNetConfig
from sdjax.models.kernels.attention import attend
from sdjax.models.layers import split_heads
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import default_loss, initial_state, make_step

HOW = dict(steps=3, guidance=3.0, seeds=[4])
TOKENS = 3  # of an image


@pytest.fixture(scope="module")
def sd():
    return pipeline.load("random:tiny")


def batch(sd, count=2, **more):
    pixels = tiny.pictures(count).astype(np.float32) / 127.5 - 1
    ids = sd.tokenize(["a face"] * count)
    return {"pixels": pixels, "ids": ids, "index": np.arange(count, dtype=np.int32), **more}


def learn(method, sd, rows, task=None, tx=None, steps=2, **options):
    """Returns (frozen, [the state before the first step and after each])."""
    task, tx = task or tasks.of(sd), tx or optax.sgd(1.0)
    trained, frozen = method.split(sd, jax.random.key(1))
    loss = default_loss(method, Train(method=method), task)
    step = jax.jit(make_step(method, tx, jax.random.key(2), loss=loss, **options))
    states = [initial_state(trained, tx, options.get("ema", 0.0))]
    for _ in range(steps):
        state, metrics = step(states[-1], frozen, rows)
        assert all(np.isfinite(value) for value in metrics.values())
        states.append(state)
    return frozen, states


def moved(before, after):
    """Returns the names of the trained weights that differ."""
    one, other = trees.flatten(before["trained"]), trees.flatten(after["trained"])
    return {name for name in one if not np.array_equal(one[name], other[name])}


def predict(sd, rows, told=None, **own):
    """Returns what the model predicts of noise for the rows' words, [B h w c]."""
    z = jax.random.normal(jax.random.key(3), (len(rows["index"]), 16, 16, 4))
    cond = sd.condition(rows["ids"]).with_own(**own)
    cond = cond if told is None else told.over(cond)
    return jax.jit(lambda sd, cond: sd.denoise(z, jnp.full(len(z), 400), cond)[0])(sd.bare, cond)


def apart(one, other):
    return np.abs(one.astype(int) - other).mean()


# ---- image tokens in attention -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ImageTokens(Method):
    """IP-Adapter's shape (Ye et al. 2023, equation 5): attention to tokens of an image, added to that to the text."""

    def split(self, sd, key=None):
        def pair(name, kernel):  # [C D]
            if key is None:
                return {"to_k": kernel, "to_v": kernel}
            drawn = jax.random.normal(trees.named_key(key, name), kernel.shape) * kernel.shape[0] ** -0.5
            return {"to_k": drawn, "to_v": jnp.zeros(kernel.shape)}

        found = trees.matching(parameters.template(sd.networks["unet"]), r"attn2\.to_k\.kernel$")
        return {name.removesuffix(".to_k.kernel"): pair(name, kernel) for name, kernel in found.items()}, sd

    def join(self, frozen, trained, key=None):
        return frozen.add(hooks=Attends(trained))


class Attends(struct.PyTreeNode):
    """The hook; cond.own["image"]: tokens [B M C]."""

    layers: object

    def intercept(self, part, layer, args, kwargs, at, cond):
        out, name = layer(*args, **kwargs), ".".join(at.module.path)
        if part != "unet" or at.method_name != "attend" or name not in self.layers:
            return out
        q, heads = args[0], args[0].shape[2]
        k, v = (
            split_heads(cond.own["image"] @ self.layers[name][one], heads).astype(q.dtype) for one in self.layers[name]
        )
        return out + attend(q, k, v)


class Shown(struct.PyTreeNode, Conditioner):
    """The conditioner of sampling: tokens [1 M C] of one image, and zeros on the other side of guidance."""

    tokens: object

    def __call__(self, sd, z, t, i, cond):
        image = jnp.broadcast_to(self.tokens, (len(z), *self.tokens.shape[1:]))
        negative = (cond.negative or Cond()).with_own(image=jnp.zeros_like(image))
        return cond.with_own(image=image).replace(negative=negative), {}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(5).standard_normal((2, TOKENS, 32), np.float32)


@pytest.fixture(scope="module")
def adapted(sd, images):
    return learn(ImageTokens(), sd, batch(sd, image=images))


def test_image_tokens_learn(sd, images, adapted):
    frozen, (start, first, second) = adapted
    names = trees.flatten(start["trained"])
    assert len(names) == 2 * len(trees.matching(sd.parts["unet"], r"attn2\.to_q\.kernel$")) > 0
    assert moved(start, first) == {name for name in names if name.endswith("to_v")}  # to_k waits for to_v, as zero
    assert moved(first, second) == set(names)
    rows = batch(sd)
    np.testing.assert_allclose(
        predict(ImageTokens().join(frozen, start["trained"]), rows, image=images), predict(sd, rows), atol=1e-5
    )
    like = jax.tree.map(lambda x: (x.shape, x.dtype), start["trained"])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), ImageTokens().split(sd)[0]) == like


def test_image_tokens_make_other_pictures_on_the_prompts_side_alone(sd, images, adapted):
    frozen, states = adapted
    joined = ImageTokens().join(frozen, states[-1]["trained"])

    def made(tokens, **options):
        return sdjax.text2img(joined.add(conditioners=Shown(jnp.asarray(tokens))), ["a face"], **HOW | options)

    plain = sdjax.text2img(sd, ["a face"], **HOW)
    one, other, none = (made(tokens) for tokens in (images[:1], images[1:], 0 * images[:1]))
    assert apart(none, plain) < 0.1 and min(apart(one, plain), apart(other, plain), apart(one, other)) > 0.5
    # At scale 0 the picture is that of the other side, which sees no image.
    np.testing.assert_allclose(
        made(images[:1], guidance=0.0), sdjax.text2img(sd, ["a face"], **HOW | {"guidance": 0.0}), atol=1
    )


# ---- a side branch, on the upscaler --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Branch(Method):
    """LoRA's shape (Hu et al. 2021, equation 3) in what layers compute: x A B beside x W."""

    rank: int = 2

    def split(self, sd, key=None):
        def pair(name, kernel):  # [in out]
            sizes = {"A": (kernel.shape[0], self.rank), "B": (self.rank, kernel.shape[1])}
            if key is None:
                return {one: jax.ShapeDtypeStruct(shape, jnp.float32) for one, shape in sizes.items()}
            drawn = jax.random.normal(trees.named_key(key, name), sizes["A"]) * kernel.shape[0] ** -0.5
            return {"A": drawn, "B": jnp.zeros(sizes["B"])}

        found = trees.matching(sd.parts["unet"], r"\.to_[qv]\.kernel$")
        return {name.removesuffix(".kernel"): pair(name, kernel) for name, kernel in found.items()}, sd

    def join(self, frozen, trained, key=None):
        return frozen.add(hooks=Branches(trained))


class Branches(struct.PyTreeNode):
    """The hook of pairs by the layer's name."""

    pairs: object

    def intercept(self, part, layer, args, kwargs, at, cond):
        out, pair = layer(*args, **kwargs), self.pairs.get(".".join(at.module.path))
        if part != "unet" or pair is None or at.method_name != "__call__":
            return out
        return out + (args[0] @ pair["A"] @ pair["B"]).astype(out.dtype)


@pytest.mark.slow
def test_a_side_branch_learns_on_the_upscaler_and_enlarges(sd):
    task = tasks.of(sd, "upscaling")
    upscaler = task.prepare(sd, jax.random.key(0))
    rows, method = batch(upscaler), Branch()
    frozen, (start, first, second) = learn(method, upscaler, rows, task)
    names = trees.flatten(start["trained"])
    assert {name.split(".")[-2] for name in names} == {"to_q", "to_v"}
    assert moved(start, first) == {name for name in names if name.endswith(".B")}
    assert moved(first, second) == set(names)
    told = task.inputs(upscaler, rows, jax.random.key(4))
    plain, same, other = (
        predict(one, rows, told)
        for one in (upscaler, *(method.join(frozen, state["trained"]) for state in (start, second)))
    )
    np.testing.assert_allclose(same, plain, atol=1e-5)
    assert np.abs(other - plain).max() > 1e-3
    small = tiny.pictures(1, 16)[0]
    joined = method.join(frozen, second["trained"])
    one, other = (sdjax.upscale(model, ["a face"], small, **HOW) for model in (upscaler, joined))
    assert one.shape == other.shape == (1, 32, 32, 3) and apart(one, other) > 0.5


# ---- a network beside the UNet, on an inpainting model -------------------------------------------

ZERO = r"^controlnet_(down_blocks\.\d+|mid_block)\.|^controlnet_cond_embedding\.conv_out\."
OUT = r"^controlnet_(down_blocks\.\d+|mid_block)\."


@dataclasses.dataclass(frozen=True)
class Beside(Method):
    """ControlNet's shape (Zhang et al. 2023): a copy of the way down that looks at cond.own["control"]["hint"]."""

    pixels = True

    def network(self, sd):
        return ControlNet(ControlNetConfig.of(sd.networks["unet"].config, sd.factor))

    def split(self, sd, key=None):
        network = self.network(sd)
        if key is None:
            return parameters.template(network), sd
        read, unet = network.config.unet.in_channels, trees.flatten(sd.parts["unet"])

        def begin(name, drawn):
            if re.search(ZERO, name):
                return jnp.zeros_like(drawn)
            copied = unet.get(name, drawn)
            return copied[:, :, :read] if name == "conv_in.kernel" else copied

        return trees.copy(trees.map_names(begin, parameters.random_parameters(network, "float32")), jnp.float32), sd

    def join(self, frozen, trained, key=None):
        return frozen.add(wrappers=wrappers.ControlNet(trained, network=self.network(frozen)))


class Hinted(struct.PyTreeNode, Conditioner):
    """The conditioner of sampling: one picture [1 H W 3] in [0, 1]."""

    hint: object

    def __call__(self, sd, z, t, i, cond):
        return cond.with_own(control={"hint": jnp.broadcast_to(self.hint, (len(z), *self.hint.shape[1:]))}), {}


@pytest.mark.slow
def test_a_network_beside_the_unet_learns_on_an_inpainting_model_and_paints(sd):
    task = tasks.of(sd, "inpainting")
    painter, method = task.prepare(sd, jax.random.key(0)), Beside()
    shape = (tiny.pictures(1, seed=1) > 127).astype(np.float32)  # black and white, as edges are
    hints = np.concatenate([shape, 1 - shape])
    rows = batch(painter, control={"hint": hints})
    frozen, states = learn(method, painter, rows, task, optax.adam(0.03), steps=3)
    names = set(trees.flatten(states[0]["trained"]))
    assert moved(*states[:2]) == {name for name in names if re.search(OUT, name)}
    late = {name for name in names if name.startswith("controlnet_cond_embedding") and "conv_out" not in name}
    assert moved(*states[1:3]) == names - late and moved(*states[2:]) == names
    told = task.inputs(painter, rows, jax.random.key(4))
    joined = [method.join(frozen, states[i]["trained"]) for i in (0, -1)]
    plain, same, other = (predict(one, rows, told, control={"hint": hints}) for one in (painter, *joined))
    np.testing.assert_allclose(same, plain, atol=1e-5)
    assert np.abs(other - plain).max() > 1e-3
    given, mask = tiny.pictures(1)[0], np.zeros((32, 32), np.uint8)
    mask[6:26, 6:26] = 255
    painted = [sdjax.inpaint(one, ["a face"], given, mask, **HOW)
               for one in (painter, *(joined[-1].add(conditioners=Hinted(one[None])) for one in hints))]  # fmt: skip
    assert min(apart(painted[0], painted[1]), apart(painted[1], painted[2])) > 0.5
    for one in painted:
        np.testing.assert_array_equal(one[0][mask == 0], given[mask == 0])


# ---- an optimizer that is looked at elsewhere ----------------------------------------------------


def optimizer(optim, steps):
    """Returns (tx, evaluate) of schedule-free gradient descent (Defazio et al. 2024), with clipping before it."""
    tx = optax.chain(
        optax.clip_by_global_norm(optim.clip), schedule_free(optax.sgd(optim.lr), optim.lr, optim.betas[0])
    )
    return tx, lambda opt, trained: schedule_free_eval_params(opt[1], trained)


def test_schedule_free_is_averaged_and_looked_at_by_evaluate(sd):
    """y, where gradients are taken, is beta x + (1 - beta) z; x, the mean of all z, is what is looked at."""
    optim, method = Optim(lr=0.5, betas=(0.8, 0.999)), Full(("unet",), r"^conv_out\.")
    tx, evaluate = optimizer(optim, 3)
    frozen, states = learn(method, sd, batch(sd), tx=tx, steps=3, ema=0.5, evaluate=evaluate)
    z = [state["opt"][1].z for state in states]
    mean = jax.tree.map(lambda *each: sum(each) / len(each), *z[1:])
    looked = [evaluate(state["opt"], state["trained"]) for state in states]
    ema = states[0]["trained"]
    for n, x in enumerate(looked[1:]):
        decay = min(0.5, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, ema, x)
    last = trees.flatten(states[-1]["trained"])
    for name, x in trees.flatten(looked[-1]).items():
        np.testing.assert_allclose(x, trees.flatten(mean)[name], atol=1e-5)
        np.testing.assert_allclose(last[name], 0.8 * x + 0.2 * trees.flatten(z[-1])[name], atol=1e-5)
        np.testing.assert_allclose(trees.flatten(states[-1]["ema"])[name], trees.flatten(ema)[name], atol=1e-5)
        assert np.abs(x - last[name]).max() > 1e-4
    plain, seen = (sdjax.text2img(one, ["a face"], **HOW) for one in (sd, method.join(frozen, looked[-1])))
    assert apart(plain, seen) > 0.5
