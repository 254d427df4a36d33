"""The forms of the 3x3 convolution against the exact one; where a CPU takes which; gradients are the plain one's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sdjax.models.kernels import convolution, winograd


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
def test_winograds_is_the_plain_convolution_at_any_size(shape):
    x, kernel = example(*shape, 12, 20)
    found = jax.jit(winograd.convolve)(x, kernel)
    np.testing.assert_allclose(found, exact(x, kernel), atol=3e-6)


@pytest.mark.parametrize("form", [convolution.plain, convolution.im2col, convolution.by_rows])
def test_other_forms_are_the_plain_convolution(form):
    x, kernel = example(2, 5, 8, 12, 20)
    np.testing.assert_allclose(jax.jit(form)(x, kernel), exact(x, kernel), atol=3e-6)


@pytest.mark.parametrize("unit", [False, True])
def test_bfloat16_goes_by_rows_where_the_processor_has_a_unit_for_it(unit, monkeypatch):
    x, kernel = (jnp.asarray(part, jnp.bfloat16) for part in example(2, 8, 9, 64, 64))
    taken, by_rows = [], convolution.by_rows
    monkeypatch.setattr(convolution, "matrix_unit", lambda: unit)
    monkeypatch.setattr(convolution, "by_rows", lambda *pair: taken.append(1) or by_rows(*pair))
    found, backward = jax.vjp(convolution.convolve, x, kernel)
    wanted = exact(np.asarray(x, np.float32), np.asarray(kernel, np.float32))
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, atol=0.02 * np.abs(wanted).max())
    grads = backward(jnp.ones_like(found))
    exactly = jax.grad(lambda *pair: convolution.plain(*pair).sum(), (0, 1))(x.astype(float), kernel.astype(float))
    for one, other in zip(grads, exactly, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float32), other, atol=0.02 * np.abs(other).max())
    assert len(taken) == 2 * unit  # forward, and the gradient of x


def test_large_layers_take_winograds_and_gradients_do_not(monkeypatch):
    x, kernel = example(4, 16, 17, 320, 320)
    taken, convolve = [], winograd.convolve
    monkeypatch.setattr(convolution.winograd, "convolve", lambda *pair: taken.append(1) or convolve(*pair))
    found = convolution.convolve(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(found, exact(x, kernel), atol=2e-5)
    assert taken == [1]
    convolution.convolve(jnp.asarray(x[:3]), jnp.asarray(kernel))  # too few positions for transforming the kernel
    assert taken == [1]

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    ours, theirs = (
        jax.grad(lambda *pair, f=f: jnp.square(f(*pair)).mean(), (0, 1))(x, kernel)
        for f in (convolution.convolve, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    assert taken == [1]
