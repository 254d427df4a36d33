"""Winograd's 3x3 convolution against the plain one; where a CPU takes it; gradients are the plain one's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sdjax.models import layers, winograd


def example(rows, height, width, size, features):
    random = np.random.default_rng([height, width, size])
    x = random.standard_normal((rows, height, width, size), np.float32)
    return x, random.standard_normal((3, 3, size, features), np.float32) / np.float32(3 * size**0.5)


def exact(x, kernel):
    """Returns the convolution in float64."""
    x = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return sum(x[:, i : i + height, j : j + width] @ kernel[i, j].astype(float) for i in range(3) for j in range(3))


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 5, 8), (3, 6, 7), (1, 1, 1), (1, 2, 3)])
def test_any_size_is_the_plain_convolution(shape):
    x, kernel = example(*shape, 12, 20)
    found = jax.jit(winograd.convolve)(x, kernel)
    np.testing.assert_allclose(found, exact(x, kernel), atol=3e-6)


def test_large_layers_take_it_and_gradients_do_not(monkeypatch):
    x, kernel = example(1, 16, 17, 320, 320)
    taken, convolve = [], winograd.convolve
    monkeypatch.setattr(layers.winograd, "convolve", lambda *pair: taken.append(1) or convolve(*pair))
    found = layers.convolve(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(found, exact(x, kernel), atol=2e-5)
    assert taken == [1]

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    ours, theirs = (
        jax.grad(lambda *pair, f=f: jnp.square(f(*pair)).mean(), (0, 1))(x, kernel) for f in (layers.convolve, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    assert taken == [1]
