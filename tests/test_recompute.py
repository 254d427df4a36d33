"""remat=: every kind has the gradients of all kept, and keeps less in turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax.settings
from sdjax.formats.models import presets
from sdjax.models import recompute
from sdjax.models.unet import Layers, UNet, UNetConfig, example
from sdjax.settings import SettingError
from sdjax.training.settings import Train

CONFIG = UNetConfig(**presets.SHAPES["tiny"]["unet"])


def a_level(remat):
    """A residual block and a transformer of the tiny model, and a network of both in one function of parameters."""
    random = np.random.default_rng(0)
    x, time, text = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((2, 8, 8, CONFIG.block_out_channels[0]), (2, 4 * CONFIG.block_out_channels[0]), (2, 5, 32))
    )
    layers = Layers(dataclasses.replace(CONFIG, cross_attention_dim=32), 0, remat=remat)

    class Level(recompute.nn.Module):
        @recompute.nn.compact
        def __call__(self, x):
            return layers.transform(0, layers.resnet(0)(x, time), text)

    level = Level()
    shapes = jax.eval_shape(level.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape) * 0.1, leaf.dtype), shapes)
    return level.apply, params, x


def apart(tree, other):
    """The distance of two trees as a part of the first's length."""
    found, there = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(one)]) for one in (tree, other))
    return np.linalg.norm(found - there) / np.linalg.norm(found)


def test_a_level_has_the_gradients_of_all_kept_and_keeps_less_in_turn():
    gradients, kept = [], []
    for remat in recompute.KINDS:
        apply, params, x = a_level(remat)
        gradients.append(jax.jit(jax.grad(lambda params, apply=apply, x=x: jnp.square(apply(params, x)).sum()))(params))
        back = jax.eval_shape(lambda params, apply=apply, x=x: jax.vjp(lambda p: apply(p, x), params)[1], params)
        kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back)))
    assert max(apart(gradients[0], other) for other in gradients[1:]) <= 1e-6
    assert kept[0] > 1.5 * kept[1] and kept[1] > 1.2 * kept[2], kept


@pytest.mark.slow
@pytest.mark.parametrize("remat", recompute.KINDS[1:])
def test_a_whole_unet_has_the_gradients_of_all_kept(remat):
    inputs = example(CONFIG)
    inputs["z"] = jax.random.normal(jax.random.key(1), (2, 16, 16, CONFIG.in_channels))
    width = inputs["context"].shape[-1]
    inputs["t"], inputs["context"] = jnp.array([3.0, 700.0]), jax.random.normal(jax.random.key(2), (2, 7, width))
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: UNet(CONFIG).init(jax.random.key(0), **inputs))
    params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape) * 0.1, leaf.dtype), shapes)

    def gradient(remat):
        network = UNet(CONFIG, remat=remat)
        return jax.jit(jax.grad(lambda params: jnp.square(network.apply(params, **inputs)[0]).mean()))(params)

    assert apart(gradient(False), gradient(remat)) <= 1e-6


def test_the_setting_takes_the_kinds_alone():
    given = ["model=random:tiny", "data.path=photo.png"]
    for text, value in (("products", "products"), ("true", True), ("false", False)):
        assert sdjax.settings.load("configs/lora.py", [*given, f"remat={text}"]).remat == value
    with pytest.raises(SettingError, match="remat='dots': expected one of False, products, True"):
        Train(remat="dots")
