"""The critics: the patch discriminator, LPIPS against its formula in PyTorch, and the distance of features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_weights import assert_close, fill, shapes, to_torch, tree

from sdjax import trees
from sdjax.models.clip import ImageConfig, ImageEncoder
from sdjax.models.critics import Lpips, PatchDiscriminator, feature_distance

WIDTHS = (6, 8, 10, 12, 12)


def pictures(side=32, rows=2, seed=0):
    return jnp.array(np.random.default_rng(seed).uniform(-1, 1, (rows, side, side, 3)), jnp.float32)


def random_like(template):
    """Returns a tree of noise."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.array(0.3 * rng.standard_normal(x.shape), x.dtype), template)


def torch_discriminator(channels, layers, groups):
    """Returns the layers as PyTorch modules, in the places that the names say."""
    nn, sequence, width = torch.nn, [], channels
    sequence += [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
    for i in range(1, layers + 1):
        before, width = width, channels * min(2**i, 8)
        sequence += [nn.Conv2d(before, width, 4, 1 if i == layers else 2, 1, bias=False)]
        sequence += [nn.GroupNorm(groups, width), nn.LeakyReLU(0.2)]
    module = nn.Module()
    module.main = nn.Sequential(*sequence, nn.Conv2d(width, 1, 4, 1, 1))
    return fill(module)


@pytest.mark.parametrize("channels, layers, side", [(8, 3, 40), (4, 2, 33), (4, 1, 16)])
def test_discriminator_equals_pytorch(channels, layers, side):
    module = torch_discriminator(channels, layers, groups=4)
    ours, x = PatchDiscriminator(channels, layers, groups=4), pictures(side)
    template = jax.eval_shape(lambda: ours.init(jax.random.key(0), x))["params"]
    with torch.no_grad():
        theirs = module.main(to_torch(x)).permute(0, 2, 3, 1)
    assert_close(jax.jit(ours.apply)({"params": tree(module.state_dict(), template)}, x), theirs)


def test_discriminator_has_the_published_size():
    ours = PatchDiscriminator()
    scores, params = jax.eval_shape(lambda: ours.init_with_output(jax.random.key(0), jnp.zeros((1, 256, 256, 3))))
    assert scores.shape == (1, 30, 30, 1)
    assert trees.count(params) == 2_765_633  # CompVis latent-diffusion, kl-f8's discriminator


def test_discriminator_judges_each_picture_alone():
    ours, x = PatchDiscriminator(4, 2), pictures()
    params = random_like(jax.eval_shape(ours.init, jax.random.key(0), x))
    judge = jax.jit(ours.apply)
    np.testing.assert_allclose(judge(params, x)[:1], judge(params, x.at[1].set(0))[:1], atol=1e-6)


def test_discriminator_sees_34_pixels_with_two_layers():
    ours, x = PatchDiscriminator(4, 2), pictures(64, rows=1)
    kernels = trees.flatten(jax.eval_shape(ours.init, jax.random.key(0), x)["params"])

    def score(x):  # convolutions alone: the norms look at the whole picture
        for place, strides in ((0, 2), (2, 2), (5, 1), (8, 1)):
            kernel = jnp.ones(kernels[f"main.{place}.kernel"].shape)
            x = jax.lax.conv_general_dilated(
                x, kernel, (strides, strides), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return x[0, 7, 7, 0]

    seen = jax.jit(jax.grad(score))(x)[0].sum(-1) > 0
    assert seen.any(0).sum() == 34 and seen.any(1).sum() == 34


def test_discriminator_refuses_small_pictures():
    with pytest.raises(ValueError, match=r"\(16, 16\): 3 layers need 24 pixels"):
        PatchDiscriminator().init(jax.random.key(0), pictures(16))


def lpips_in_torch(state, x, y):
    """Returns LPIPS by its formula, from {file name: tensor}."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    stages = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision vgg16().features
    maps, total = [(picture - shift) / scale for picture in (x, y)], 0
    for stage, places in enumerate(stages):
        for place in places:
            weight, bias = state[f"features.{place}.weight"], state[f"features.{place}.bias"]
            maps = [torch.relu(torch.nn.functional.conv2d(z, weight, bias, padding=1)) for z in maps]
        first, second = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in maps)
        lin = torch.nn.functional.conv2d((first - second).square(), state[f"lin{stage}.model.1.weight"])
        total = total + lin.mean((2, 3))[:, 0]
        maps = [torch.nn.functional.max_pool2d(z, 2) for z in maps]
    return total


def test_lpips_equals_its_formula():
    ours, x, y = Lpips(WIDTHS), pictures(35), pictures(35, seed=1)
    template = jax.eval_shape(lambda: ours.init(jax.random.key(0), x, y))["params"]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes(template).items():
        spread = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.1
        state[name] = spread * torch.randn(shape, generator=generator)
        state[name] = state[name].abs() if name.startswith("lin") else state[name]
    params = {"params": tree(state, template)}
    distance = jax.jit(ours.apply)
    assert_close(distance(params, x, y), lpips_in_torch(state, to_torch(x), to_torch(y)))
    assert np.abs(distance(params, x, x)).max() < 1e-9
    slope = jax.jit(jax.grad(lambda y: ours.apply(params, x, y).sum()))(y)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_lpips_has_the_names_of_its_files():
    x = jnp.zeros((1, 16, 16, 3))
    found = shapes(jax.eval_shape(lambda: Lpips().init(jax.random.key(0), x, x))["params"])
    assert len(found) == 2 * 13 + 5
    assert found["features.0.weight"] == (64, 3, 3, 3) and found["features.28.weight"] == (512, 512, 3, 3)
    assert [found[f"lin{i}.model.1.weight"] for i in range(5)] == [(1, d, 1, 1) for d in (64, 128, 256, 512, 512)]


def test_lpips_refuses_small_pictures():
    with pytest.raises(ValueError, match=r"\(15, 15\): LPIPS needs 16"):
        Lpips(WIDTHS).init(jax.random.key(0), pictures(15), pictures(15))


def test_black_features_have_finite_gradients():
    states = (jnp.zeros((2, 5, 4)),)
    slope = jax.grad(lambda x: feature_distance((x,), (states[0] + 1,)).sum())(states[0])
    assert np.isfinite(slope).all()


def test_feature_distance_is_a_distance():
    kind = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    encoder, x = ImageEncoder(ImageConfig(**kind, image_size=16, patch_size=4, projection_dim=8)), pictures(16)
    params = random_like(jax.eval_shape(encoder.init, jax.random.key(0), x))
    states = jax.jit(lambda params, x: encoder.apply(params, x, method="states"))
    here, near, far = (states(params, y) for y in (x, x + 0.1 * pictures(16, seed=2), pictures(16, seed=3)))
    distance = jax.jit(feature_distance)
    assert np.abs(distance(here, here)).max() < 1e-9
    np.testing.assert_allclose(distance(here, far), distance(far, here), rtol=1e-6)
    assert (distance(here, near) < distance(here, far)).all() and distance(here, far).shape == (2,)
    by_hand = []
    for a, b in zip(here, far, strict=True):
        a, b = (np.asarray(f, np.float64)[:, 1:] for f in (a, b))
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        by_hand.append((2 - 2 * cosine).mean(1))
    np.testing.assert_allclose(distance(here, far), np.mean(by_hand, 0), rtol=1e-5)
