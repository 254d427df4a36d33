"""2-D convolution, with the implementation that suits its shape, type and platform.

    y = convolve(x, kernel, strides=1, pads=((1, 1), (1, 1)))        # [B h w in], [a b in out] -> [B h' w' out]

GPUs and TPUs use XLA's own.  On a CPU, a 3x3 convolution of stride 1 has four implementations, one file each:
    convolution_plain      XLA's
    convolution_im2col     one product of all neighbourhoods
    convolution_winograd   Winograd's
    convolution_rows       three products, for processors that multiply bfloat16 matrices
benchmarks/convolutions.py is the source of the choice.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from sdjax.models.kernels import (
    convolution_gradient,
    convolution_im2col,
    convolution_plain,
    convolution_rows,
    convolution_winograd,
)
from sdjax.models.kernels.convolution_plain import Pads
from sdjax.models.kernels.precision import precision


def convolve(
    x: Float[Array, "B h w in"], kernel: Float[Array, "a b in out"], strides: int = 1, pads: Pads = ((1, 1), (1, 1))
) -> Float[Array, "B _ _ out"]:
    """Returns the convolution of x [B h w in] with kernel [a b in out], without bias."""
    if kernel.shape[:2] == (1, 1) and strides == 1 and tuple(pads) == ((0, 0), (0, 0)):
        return jnp.matmul(x, kernel[0, 0], precision=precision(x.dtype))
    if strides == 1 and kernel.shape[:2] == (3, 3) and tuple(pads) == ((1, 1), (1, 1)):
        return _convolve3(x, kernel)
    return _plain(x, kernel, strides, tuple(pads))


_plain = jax.jit(convolution_plain.convolve, static_argnums=(2, 3))


def convolve_wide(
    x: Float[Array, "B h w in"], kernel: Float[Array, "a b in out"], strides: int = 1, pads: Pads = ((1, 1), (1, 1))
) -> Float32[Array, "B _ _ out"]:
    """Returns the float32 sums of `convolve` before they are rounded to x's type; its gradients are convolve's."""
    return convolve(x, kernel, strides, pads) if x.dtype == jnp.float32 else _wide(strides, pads, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _wide(strides, pads, x, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), pads, dimension_numbers=dims, preferred_element_type=jnp.float32
    )


def _wide_backward(strides, pads, kept, grad):
    _, back = jax.vjp(lambda x, kernel: convolve(x, kernel, strides, pads), *kept)
    return back(grad.astype(kept[0].dtype))


_wide.defvjp(lambda strides, pads, x, kernel: (_wide(strides, pads, x, kernel), (x, kernel)), _wide_backward)


@jax.custom_vjp
def _convolve3(x, kernel):
    """Returns a 3x3 convolution of stride 1; on a CPU its gradients have their own implementations."""
    return _lowered(fastest(x, kernel), convolution_plain.convolve, x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lowered(cpu, others, *args):
    """Returns cpu(*args) if lowered for a CPU, others(*args) otherwise; layers of a shape share this function."""
    return others(*args) if cpu is others else lax.platform_dependent(*args, cpu=cpu, default=others)


def fastest(x: Float[Array, "B h w in"], kernel: Float[Array, "3 3 in out"]) -> Callable:
    """Returns the fastest implementation of a 3x3 convolution on a CPU."""
    positions, products = x.shape[1] * x.shape[2], x.shape[3] * kernel.shape[3]
    pays = x.shape[0] * positions >= 1024  # otherwise transforming the kernel takes longer than it saves
    if x.dtype == jnp.float32 and pays and 256 <= positions <= 4096 and products >= 320 * 320:
        return convolution_winograd.convolve
    return differentiated(x, kernel)


def differentiated(x: Float[Array, "B h w in"], kernel: Float[Array, "3 3 in out"] | jax.ShapeDtypeStruct) -> Callable:
    """Returns the implementation for a CPU under a gradient: one with few operations, for short compile times."""
    height, width, size, features = x.shape[1], x.shape[2], *kernel.shape[2:]
    if x.dtype == jnp.bfloat16 and min(size, features) >= 64 and convolution_rows.matrix_unit():
        return convolution_rows.convolve
    if height * width <= 256 and size * features >= 640 * 640 and size >= 640:
        return convolution_im2col.convolve
    return convolution_plain.convolve


def _forward(x, kernel):
    return _lowered(differentiated(x, kernel), convolution_plain.convolve, x, kernel), (x, kernel)


def _backward(saved, grad):
    x, kernel = saved
    small = x.shape[1] * x.shape[2] < 256 or min(kernel.shape[2:]) < 32
    turned = jax.ShapeDtypeStruct((3, 3, kernel.shape[3], kernel.shape[2]), kernel.dtype)
    return (
        _lowered(_turned(differentiated(grad, turned)), _input_gradient, x, kernel, grad),
        _lowered(_kernel_gradient if small else _as_products, _kernel_gradient, x, kernel, grad),
    )


def _input_gradient(x, kernel, grad):
    return jax.vjp(lambda x: convolution_plain.convolve(x, kernel), x)[1](grad)[0]


@functools.cache
def _turned(way):
    """Returns the function of the input's gradient: a convolution with the kernel rotated by 180 degrees."""
    return lambda x, kernel, grad: way(grad, kernel[::-1, ::-1].swapaxes(2, 3))


def _kernel_gradient(x, kernel, grad):
    return jax.vjp(lambda kernel: convolution_plain.convolve(x, kernel), kernel)[1](grad)[0]


def _as_products(x, kernel, grad):
    return convolution_gradient.kernel_gradient(x, grad)


_convolve3.defvjp(_forward, _backward)
