"""Interpolates noise on an arc, for variations and for frames between two seeds.

Shapes: B batch, h w latent pixels, c latent channels.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def slerp(
    low: Float[Array, "B h w c"], high: Float[Array, "B h w c"], amount: Float[ArrayLike, "..."]
) -> Float[Array, "B h w c"]:
    """Returns noise [B h w c] on the arc from low (amount 0) to high (1), for each column of h numbers.

    It is (sin((1 - v) w) low + sin(v w) high) / sin w, where w is the angle between two columns; a line if they are
    parallel.
    Source: A1111's variation seeds; its arcs also run along columns, so strengths have the same meaning.
    """

    def unit(x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    cosine = jnp.clip(jnp.sum(unit(low) * unit(high), axis=1, keepdims=True), -1, 1)
    angle = jnp.arccos(cosine)
    flat = jnp.abs(cosine) > 0.9995
    sine = jnp.where(flat, 1, jnp.sin(angle))
    arc = (jnp.sin((1 - amount) * angle) * low + jnp.sin(amount * angle) * high) / sine
    return jnp.where(flat, (1 - amount) * low + amount * high, arc)
