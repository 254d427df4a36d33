"""2-D convolution in the form that runs fastest: by shape, type and backend.

    y = convolve(x, kernel, strides=1, pads=((1, 1), (1, 1)))        # [B h w in], [a b in out] -> [B h' w' out]

On GPUs and TPUs that is XLA's own.  On a CPU a 3x3 kernel of stride 1 has four forms: XLA's, one product of all
neighbourhoods, Winograd's, and three products where the processor multiplies bfloat16 matrices by itself.  Which one
is taken where comes from benchmarks/convolutions.py.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.models.kernels import winograd


def precision(dtype):
    """Returns the precision of products in a compute type: "highest" for float32 (GPUs and TPUs round it otherwise)."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def convolve(x, kernel, strides=1, pads=((1, 1), (1, 1))):
    """Returns the convolution of x [B h w in] with kernel [a b in out], without bias."""
    if kernel.shape[:2] == (1, 1) and strides == 1 and tuple(pads) == ((0, 0), (0, 0)):
        return jnp.matmul(x, kernel[0, 0], precision=precision(x.dtype))
    known = strides == 1 and kernel.shape[:2] == (3, 3) and tuple(pads) == ((1, 1), (1, 1))
    if known and jax.default_backend() == "cpu":
        return _convolve3(x, kernel)
    return plain(x, kernel, strides, pads)


def plain(x, kernel, strides=1, pads=((1, 1), (1, 1))):
    """Returns the convolution as XLA does it."""
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision(x.dtype)
    )


def im2col(x, kernel):
    """Returns the 3x3 convolution as one product of all neighbourhoods, [B h w 9 in]."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)
    return jnp.matmul(x, kernel.reshape(-1, kernel.shape[3]), precision=precision(x.dtype))


def by_rows(x, kernel):
    """Returns the 3x3 convolution as three products, one for each row of the kernel, summed in float32."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, :, j : j + width] for j in range(3)], axis=-1)  # [B h+2 w 3 in]
    kernel = kernel.reshape(3, -1, kernel.shape[3])
    parts = [
        jnp.matmul(x[:, i : i + height], kernel[i], precision=precision(x.dtype), preferred_element_type=jnp.float32)
        for i in range(3)
    ]
    return sum(parts).astype(x.dtype)


@functools.cache
def matrix_unit():
    """Returns whether this processor multiplies matrices of bfloat16 by itself (AMX), which Linux says."""
    path = Path("/proc/cpuinfo")
    return path.is_file() and "amx_bf16" in path.read_text()


@jax.custom_vjp
def _convolve3(x, kernel):
    """Returns a 3x3 convolution of stride 1 as XLA runs it fastest on a CPU; gradients use `_differentiated`."""
    positions, products = x.shape[1] * x.shape[2], x.shape[3] * kernel.shape[3]
    pays = x.shape[0] * positions >= 1024  # else transforming the kernel takes longer than what it saves
    if x.dtype == jnp.float32 and pays and 256 <= positions <= 4096 and products >= 320 * 320:
        return winograd.convolve(x, kernel)
    return _differentiated(x, kernel)


def _differentiated(x, kernel):
    """Returns a 3x3 convolution of stride 1 in few operations: what a training step's compilation takes time for."""
    height, width, size, features = x.shape[1], x.shape[2], *kernel.shape[2:]
    if x.dtype == jnp.bfloat16 and min(size, features) >= 64 and matrix_unit():
        return by_rows(x, kernel)
    if height * width <= 256 and size * features >= 640 * 640 and size >= 640:
        return im2col(x, kernel)
    return plain(x, kernel)


def _convolve3_backward(saved, grad):
    x, kernel = saved
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    return _differentiated(grad, flipped), _kernel_gradient(x, grad, kernel)


def _kernel_gradient(x, grad, kernel):
    """Returns the gradient of a 3x3 kernel, sum over b, h, w of x[h + i - 1, w + j - 1] grad[h, w].

    On large maps XLA's own form is two to three times slower than one product of x shifted along h, [B h w 3 in], with
    the gradient shifted along w, [B h w 3 out].
    """
    height, width, size, features = x.shape[1], x.shape[2], *kernel.shape[2:]
    if height * width < 256 or min(size, features) < 32:
        return jax.vjp(lambda k: plain(x, k), kernel)[1](grad)[0]
    grad = jnp.pad(grad, ((0, 0), (0, 0), (1, 1), (0, 0)))
    grad = jnp.concatenate([grad[:, :, 2 - j : 2 - j + width] for j in range(3)], axis=-1)  # [B h w 3 out]
    if size >= 2 * features:
        pairs = ((x[:, :-1], grad[:, 1:]), (x, grad), (x[:, 1:], grad[:, :-1]))
        rows = jnp.stack([_outer(*pair) for pair in pairs])  # [3 in 3 out]
    else:
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
        rows = _outer(jnp.concatenate([x[:, i : i + height] for i in range(3)], axis=-1), grad)  # [3 in 3 out]
    return rows.reshape(3, size, 3, features).swapaxes(1, 2)


def _outer(a, b):
    """Returns the sum over positions of a's channels times b's channels, [in out]."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=precision(a.dtype))


_convolve3.defvjp(lambda x, kernel: (_differentiated(x, kernel), (x, kernel)), _convolve3_backward)
