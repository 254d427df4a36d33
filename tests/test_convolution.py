"""The forms of the 3x3 convolution against the exact one; where a CPU takes which; gradients are the plain one's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sdjax.models.kernels import (
    convolution,
    convolution_im2col,
    convolution_plain,
    convolution_rows,
    convolution_winograd,
)


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
    found = jax.jit(convolution_winograd.convolve)(x, kernel)
    np.testing.assert_allclose(found, exact(x, kernel), atol=3e-6)


@pytest.mark.parametrize("form", [convolution_plain, convolution_im2col, convolution_rows])
def test_other_forms_are_the_plain_convolution(form):
    x, kernel = example(2, 5, 8, 12, 20)
    np.testing.assert_allclose(jax.jit(form.convolve)(x, kernel), exact(x, kernel), atol=3e-6)


@pytest.mark.parametrize("unit", [False, True])
def test_bfloat16_goes_by_rows_where_the_processor_has_a_unit_for_it(unit, monkeypatch):
    x, kernel = (jnp.asarray(part, jnp.bfloat16) for part in example(2, 8, 9, 64, 96))
    taken, by_rows = [], convolution_rows.convolve
    monkeypatch.setattr(convolution_rows, "matrix_unit", lambda: unit)
    monkeypatch.setattr(convolution_rows, "convolve", lambda *pair: taken.append(1) or by_rows(*pair))
    found, backward = jax.vjp(convolution.convolve, x, kernel)
    wanted = exact(np.asarray(x, np.float32), np.asarray(kernel, np.float32))
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, atol=0.02 * np.abs(wanted).max())
    grads = backward(jnp.ones_like(found))
    exactly = jax.grad(lambda *pair: convolution_plain.convolve(*pair).sum(), (0, 1))(
        x.astype(float), kernel.astype(float)
    )
    for one, other in zip(grads, exactly, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float32), other, atol=0.02 * np.abs(other).max())
    assert len(taken) == 2 * unit  # forward, and the gradient of x


def test_large_layers_take_winograds_and_gradients_do_not(monkeypatch):
    x, kernel = example(4, 16, 17, 320, 320)
    taken, convolve = [], convolution_winograd.convolve
    monkeypatch.setattr(convolution_winograd, "convolve", lambda *pair: taken.append(1) or convolve(*pair))
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


def lowered(function, pair, platform):
    """Returns the program of a function for a platform that need not be here, as text."""
    return jax.jit(function).trace(*pair).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("shape", "dtype", "own"),
    [
        ((2, 32, 32, 640, 640), "float32", "optimization_barrier"),  # Winograd's
        ((2, 8, 8, 1280, 1280), "float32", "concatenate"),  # neighbourhoods
        ((2, 64, 64, 320, 320), "bfloat16", "concatenate"),  # three rows
    ],
)
def test_a_cpus_ways_are_in_no_program_for_another_platform(shape, dtype, own, monkeypatch):
    monkeypatch.setattr(convolution_rows, "matrix_unit", lambda: True)
    rows, height, width, size, features = shape
    pair = [jax.ShapeDtypeStruct(s, dtype) for s in ((rows, height, width, size), (3, 3, size, features))]
    assert f"stablehlo.{own}" in lowered(convolution.convolve, pair, "cpu")
    gradients = jax.grad(lambda *pair: convolution.convolve(*pair).astype(jnp.float32).sum(), (0, 1))
    assert "stablehlo.dot_general" in lowered(gradients, pair, "cpu")
    for platform in ("cuda", "tpu"):
        text = lowered(convolution.convolve, pair, platform)
        assert own not in text and text.count("stablehlo.convolution") == 1 and "dot_general" not in text
        text = lowered(gradients, pair, platform)
        assert own not in text and text.count("stablehlo.convolution") == 2 and "dot_general" not in text
