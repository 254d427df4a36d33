"""The UNet against diffusers': names, shapes, predictions, features, residuals; its config; gradients."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from sdjax import trees
from sdjax.models.unet import UNet, UNetConfig

CROSS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "sample_size": 8,
}
THREE = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [16, 32, 48],
}
SHAPES = {
    "sd1": CROSS | {"attention_head_dim": 4, "layers_per_block": 2},
    "sd2": CROSS | {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
    "pix2pix": CROSS | {"in_channels": 8, "attention_head_dim": 4},
    "depth": CROSS | {"in_channels": 5, "attention_head_dim": [2, 4], "use_linear_projection": True},
    "inpainting": CROSS | {"in_channels": 9, "attention_head_dim": 2, "flip_sin_to_cos": False, "freq_shift": 1},
    "upscaler": CROSS
    | THREE
    | {
        "in_channels": 7,
        "attention_head_dim": 8,
        "num_class_embeds": 10,
        "only_cross_attention": [True, True, False],
        "use_linear_projection": True,
        "layers_per_block": [1, 2, 1],
    },
}


def leaves_of(module):
    """Returns a torch module's weights under our names and in our layout."""
    out = {}
    for name, value in module.state_dict().items():
        value = value.detach().numpy()
        path, leaf = name.rsplit(".", 1)
        if leaf == "weight":
            leaf = {4: "kernel", 2: "kernel", 1: "scale"}[value.ndim]
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T if value.ndim == 2 else value
            if path == "class_embedding":
                leaf, value = "embedding", value.T
        out[f"{path}.{leaf}"] = jnp.array(value)
    return out


def shapes_of(config):
    """Returns {file name: shape in the file} of our network's leaves."""
    out = {}
    for name, leaf in trees.flatten(template(config)).items():
        path, kind = name.rsplit(".", 1)
        shape = leaf.shape
        if kind == "kernel":
            shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        out[path + (".bias" if kind == "bias" else ".weight")] = tuple(shape)
    return out


def example(config, rows=2, size=(8, 8)):
    """Returns inputs of a network: latents, times, context, class labels."""
    rng = np.random.default_rng(1)
    z = rng.standard_normal((rows, *size, config.in_channels), np.float32)
    context = rng.standard_normal((rows, 5, config.cross_attention_dim), np.float32)
    labels = np.arange(rows) + 3 if config.num_class_embeds else None
    return z, np.linspace(3, 900, rows).astype(np.int32), context, labels


def template(config):
    z, t, context, labels = example(config)
    return jax.eval_shape(lambda: UNet(config).init(jax.random.key(0), z, t, context, labels))["params"]


def pair(options):
    """Returns diffusers' network with noise in every weight, our config, and the same weights as our tree."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(**options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    config = UNetConfig.from_json(dict(model.config))
    return model, config, trees.unflatten(leaves_of(model), template(config))


def torch_call(model, z, t, context, labels=None, **options):
    """Returns diffusers' prediction, channels last."""
    labels = None if labels is None else torch.tensor(labels)
    with torch.no_grad():
        out = model(to_torch(z), torch.tensor(t), torch.tensor(context), class_labels=labels, **options)
    return from_torch(out.sample)


def to_torch(x):
    return torch.tensor(np.array(x)).permute(0, 3, 1, 2)


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs, tolerance=1e-5):
    """Asserts equality within `tolerance` of the largest number."""
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours, np.float32) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_prediction_equals_diffusers(shape):
    model, config, params = pair(SHAPES[shape])
    inputs = example(config)
    prediction, _ = jax.jit(UNet(config).apply)({"params": params}, *inputs)
    assert_close(prediction, torch_call(model, *inputs))


@pytest.mark.parametrize("size", [(7, 9), (6, 5)])
def test_odd_sizes_equal_diffusers(size):
    model, config, params = pair(CROSS | THREE | {"attention_head_dim": 4})
    inputs = example(config, size=size)
    prediction, _ = jax.jit(UNet(config).apply)({"params": params}, *inputs)
    assert_close(prediction, torch_call(model, *inputs))


def test_features_are_the_skip_maps_and_the_middle():
    model, config, params = pair(SHAPES["sd1"])
    inputs, seen = example(config), []
    layers = [model.conv_in]
    for block in model.down_blocks:
        layers += list(getattr(block, "attentions", block.resnets)) + list(block.downsamplers or [])
    for layer in [*layers, model.mid_block]:
        layer.register_forward_hook(
            lambda _, __, out: seen.append(from_torch(out[0] if isinstance(out, tuple) else out))
        )
    torch_call(model, *inputs)
    prediction, features = UNet(config).apply({"params": params}, *inputs, features_only=True)
    assert prediction is None
    assert len(features) == len(seen) == 7
    for ours, theirs in zip(features, seen, strict=True):
        assert_close(ours, theirs)


def test_residuals_equal_diffusers():
    model, config, params = pair(SHAPES["sd1"])
    inputs, rng = example(config), np.random.default_rng(2)
    apply = jax.jit(UNet(config).apply)
    plain, features = apply({"params": params}, *inputs)
    extra = [rng.standard_normal(x.shape, np.float32) for x in features]
    prediction, again = apply({"params": params}, *inputs, residuals=(tuple(extra[:-1]), extra[-1]))
    theirs = torch_call(
        model,
        *inputs,
        down_block_additional_residuals=[to_torch(x) for x in extra[:-1]],
        mid_block_additional_residual=to_torch(extra[-1]),
    )
    assert_close(prediction, theirs)
    assert np.abs(np.asarray(prediction - plain)).max() > 0.1 * np.abs(theirs).max()
    assert all(np.array_equal(a, b) for a, b in zip(features, again, strict=True))


def test_names_and_shapes_are_those_of_a_real_file():
    table = {}
    for line in (pathlib.Path(__file__).parent / "data/unet_keys.txt").read_text().splitlines():
        name, shape = line.split(" ", 1)
        table[name] = tuple(int(x) for x in shape.strip("() ").split(",") if x)
    assert shapes_of(UNetConfig(cross_attention_dim=768, sample_size=64)) == table


@pytest.mark.parametrize("shape", SHAPES)
def test_config_makes_the_same_network_in_diffusers(shape):
    config = UNetConfig.from_json(SHAPES[shape])
    model = UNet2DConditionModel.from_config(config.to_json())
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == shapes_of(config)
    assert UNetConfig.from_json(dict(model.config)) == config
    assert hash(UNetConfig.from_json(config.to_json())) == hash(config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"addition_embed_type": "text_time"}, ["addition_embed_type", "text_time", "None"]),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, ["mid_block_type", "UNetMidBlock2DCrossAttn"]),
        ({"turbo": 3}, ["turbo", "unknown option", "block_out_channels"]),
        (
            {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]},
            ["down_block_types", "AttnDownBlock2D", "DownBlock2D"],
        ),
        ({"attention_head_dim": [1, 2, 3]}, ["attention_head_dim", "(1, 2, 3)"]),
        ({"attention_head_dim": 5}, ["attention_head_dim", "5", "32"]),
        ({"norm_num_groups": 24}, ["norm_num_groups", "24", "32"]),
        ({"cross_attention_dim": [8, 8]}, ["cross_attention_dim"]),
    ],
)
def test_unsupported_option_is_named(options, words):
    with pytest.raises(ValueError, match="^unet ") as error:
        UNetConfig.from_json(CROSS | options)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_every_option_of_diffusers_is_known():
    known = dict(UNet2DConditionModel(**CROSS | {"attention_head_dim": 4}).config)
    assert UNetConfig.from_json(known | {"decay": 0.9999, "_name_or_path": "x"}).block_out_channels == (32, 64)


def test_class_labels_are_asked_for():
    config = UNetConfig.from_json(SHAPES["upscaler"])
    z, t, context, _ = example(config)
    with pytest.raises(ValueError, match="class_labels"):
        UNet(config).init(jax.random.key(0), z, t, context)


@pytest.mark.slow
def test_remat_gives_the_same_loss_and_gradient_under_hooks():
    """A hook that closes over a trained number sees its gradient, with and without recomputation."""
    import flax.linen as nn

    _, config, params = pair(SHAPES["sd1"])
    inputs = example(config)

    def loss(params, gain, remat):
        def hook(run, args, kwargs, context):
            out = run(*args, **kwargs)
            return out * gain if context.module.name == "to_v" and context.method_name == "__call__" else out

        with nn.intercept_methods(hook):
            prediction, _ = UNet(config, remat=remat).apply({"params": params}, *inputs)
        return jnp.mean(jnp.square(prediction))

    value = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    (a, (tree_a, gain_a)), (b, (tree_b, gain_b)) = value(params, 1.5, False), value(params, 1.5, True)
    assert np.isclose(a, b, rtol=1e-5)
    assert np.isclose(gain_a, gain_b, rtol=1e-4)
    assert abs(gain_a) > 1e-4
    for name, leaf in trees.flatten(tree_a).items():
        other = trees.flatten(tree_b)[name]
        assert np.abs(leaf).max() > 0, name
        assert np.abs(leaf - other).max() <= 1e-4 * np.abs(leaf).max() + 1e-7, name


def test_gradient_equals_diffusers():
    model, config, params = pair(SHAPES["sd1"])
    inputs = example(config)
    out = model(to_torch(inputs[0]), torch.tensor(inputs[1]), torch.tensor(inputs[2])).sample
    out.square().sum().backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters()}
    grads = jax.jit(jax.grad(lambda p: jnp.square(UNet(config).apply({"params": p}, *inputs)[0]).sum()))(params)
    for name, ours in trees.flatten(grads).items():
        path, kind = name.rsplit(".", 1)
        other = theirs[path + (".bias" if kind == "bias" else ".weight")].numpy()
        if kind == "kernel":
            other = other.transpose(2, 3, 1, 0) if other.ndim == 4 else other.T
        assert_close(ours, other, 1e-4)


def test_bfloat16_is_near_and_keeps_its_type():
    _, config, params = pair(SHAPES["sd2"])
    inputs = example(config)
    exact, _ = jax.jit(UNet(config).apply)({"params": params}, *inputs)
    rough, features = jax.jit(UNet(config, dtype=jnp.bfloat16).apply)(
        {"params": trees.cast(params, jnp.bfloat16)}, *inputs
    )
    assert rough.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.bfloat16 for x in features)
    assert np.abs(np.asarray(rough, np.float32) - exact).mean() < 0.05 * np.abs(exact).mean()
