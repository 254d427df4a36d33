"""The autoencoder against diffusers': names, shapes, moments, decoding, odd sizes; its config; gradients."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoder
from torch_weights import assert_close, fill, from_torch, shapes, to_torch, tree

from sdjax import trees
from sdjax.models.vae import AutoencoderKL, VaeConfig

KEYS = pathlib.Path(__file__).parent / "data" / "vae_keys.txt"
SD = VaeConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
F8 = VaeConfig(block_out_channels=(8, 16, 24, 24), layers_per_block=1, norm_num_groups=4, sample_size=32)
F4 = VaeConfig(
    block_out_channels=(8, 12, 16),
    layers_per_block=2,
    norm_num_groups=4,
    latent_channels=3,
    scaling_factor=0.08333,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
)

ONE = VaeConfig(block_out_channels=(8,), norm_num_groups=4)


def template(config, remat=False):
    """Returns the shapes of our network's parameters."""
    vae = AutoencoderKL(config, remat=remat)
    size = 2 ** len(config.block_out_channels)
    pixels = jnp.zeros((1, size, size, config.in_channels))
    return jax.eval_shape(lambda: vae.init(jax.random.key(0), pixels, jax.random.key(1)))["params"]


@functools.cache
def pair(config):
    """Returns diffusers' network of our config, full of noise, and the same weights as our tree."""
    model = fill(TorchAutoencoder.from_config(config.to_json()))
    return model, {"params": tree(model.state_dict(), template(config))}


def pictures(height, width, rows=2):
    return np.random.default_rng(0).uniform(-1, 1, (rows, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("config, size", [(F8, (45, 38)), (F4, (16, 24))], ids=["f8 odd", "f4"])
def test_moments_and_decoding_equal_diffusers(config, size):
    model, params = pair(config)
    ours, x = AutoencoderKL(config), pictures(*size)
    mean, logvar = jax.jit(lambda params: ours.apply(params, x, method="encode"))(params)
    with torch.no_grad():
        theirs = model.encode(to_torch(x)).latent_dist
        back = model.decode(theirs.mean).sample
    assert_close(mean, from_torch(theirs.mean))
    assert_close(logvar, from_torch(theirs.logvar))
    z = from_torch(theirs.mean)
    assert_close(jax.jit(lambda params: ours.apply(params, z, method="decode"))(params), from_torch(back))


def test_logvar_is_clamped():
    _, params = pair(ONE)
    loud = {"params": trees.edit(params["params"], r"^encoder\.conv_out\.kernel$", lambda _, kernel: 1000 * kernel)}
    _, logvar = jax.jit(lambda p: AutoencoderKL(ONE).apply(p, pictures(8, 8), method="encode"))(loud)
    assert logvar.min() == -30 and logvar.max() == 20


def test_names_and_shapes_of_stable_diffusion():
    lines = [line.split(" ", 1) for line in KEYS.read_text().splitlines()]
    published = {name: tuple(int(side) for side in shape.strip("(),").split(",")) for name, shape in lines}
    assert len(published) == 248
    for remat in (False, True):
        assert shapes(template(SD, remat)) == published


def test_calling_draws_around_the_mean():
    _, params = pair(ONE)
    x, vae = pictures(8, 8), AutoencoderKL(ONE)
    made, mean, logvar = jax.jit(lambda params: vae.apply(params, x, jax.random.key(3)))(params)
    z = mean + jnp.exp(logvar / 2) * jax.random.normal(jax.random.key(3), mean.shape)
    assert_close(made, np.asarray(jax.jit(lambda params: vae.apply(params, z, method="decode"))(params)))


def test_remat_changes_no_gradient():
    _, params = pair(ONE)
    x = pictures(8, 8)

    def loss(params, remat):
        made, _, _ = AutoencoderKL(ONE, remat=remat).apply(params, x, jax.random.key(3))
        return jnp.square(made - x).mean()

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, remat) for remat in (False, True))
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(one, two, atol=1e-4 * np.abs(one).max() + 1e-7)


def test_bfloat16_gives_float32_moments():
    _, params = pair(ONE)
    mean, _ = jax.jit(lambda p: AutoencoderKL(ONE, jnp.bfloat16).apply(p, pictures(8, 8), method="encode"))(params)
    exact, _ = jax.jit(lambda p: AutoencoderKL(ONE).apply(p, pictures(8, 8), method="encode"))(params)
    assert mean.dtype == jnp.float32
    assert np.abs(mean - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("config", [SD, F8, F4], ids=["sd", "f8", "f4"])
def test_config_returns_as_it_was_and_loads_in_diffusers(config):
    with torch.device("meta"):
        model = TorchAutoencoder.from_config(config.to_json())
    read = dict(model.config)
    assert shapes(template(config)) == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    written = config.to_json()
    assert VaeConfig.from_json(written) == config and hash(VaeConfig.from_json(written)) == hash(config)
    assert set(written) - {"_class_name"} == {name for name in read if not name.startswith("_")}
    assert VaeConfig.from_json(read) == config


def test_old_config_files_have_fewer_keys():
    config = VaeConfig.from_json(
        {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.2.2",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "out_channels": 3,
            "sample_size": 512,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }
    )
    assert config == SD and config.scaling_factor == 0.18215


@pytest.mark.parametrize(
    "options, message",
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name='AutoencoderTiny'"),
        ({"shift_factor": 0.1}, "shift_factor=0.1: expected None"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"act_fn": "relu"}, "act_fn='relu': expected 'silu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"block_out_channels": [32, 64]} | {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ({"block_out_channels": [32, 40]}, r"block_out_channels=\(32, 40\): expected multiples of norm_num_groups=32"),
        ({"patch_size": 2}, "patch_size=2: unknown option"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        VaeConfig.from_json(options)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_float16_is_computed_in_float32_where_the_config_asks(method):
    """Maps of this autoencoder exceed float16's 65504, as those of Stable Diffusion XL's do."""
    params = trees.edit(pair(ONE)[1], r"conv_in\.kernel$", lambda _, w: 3000 * w)
    params = trees.cast(params, "float16")
    x = 100 * pictures(8, 8)[..., [0, 1, 2] if method == "encode" else [0, 1, 2, 0]]

    def made(dtype, upcast):
        vae = AutoencoderKL(dataclasses.replace(ONE, force_upcast=upcast), jnp.dtype(dtype))
        return np.asarray(jnp.asarray(vae.apply(params, x, method=method)), np.float32)

    exact = made("float32", False)
    assert np.isfinite(exact).all()
    np.testing.assert_array_equal(made("float16", True), exact)
    assert not np.isfinite(made("float16", False)).all()
    assert not np.array_equal(made("bfloat16", True), exact)
