"""The gradient of a 3x3 kernel as one or three matrix products, on a CPU faster than XLA's own for large maps."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sdjax.models.kernels.precision import precision


def kernel_gradient(x: Float[Array, "B h w in"], grad: Float[Array, "B h w out"]) -> Float[Array, "3 3 in out"]:
    """Returns the gradient of a 3x3 kernel [3 3 in out], the sum over b, h, w of x[h + i - 1, w + j - 1] grad[h, w].

    x: [B h w in].  grad: [B h w out].  One product of x shifted along h, [B h w 3 in], and the gradient shifted along
    w, [B h w 3 out], is two to three times faster than XLA's own form.
    """
    height, width, size, features = *x.shape[1:], grad.shape[-1]
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
