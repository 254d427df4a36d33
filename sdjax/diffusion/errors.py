"""Errors of a prediction: error(schedule, t, prediction, target) returns one error per element, float32 [B h w c].

diffusion_loss(sd, batch, key, error=squared)
diffusion_loss(sd, batch, key, error=partial(huber, c=0.1, decay="snr"))
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from sdjax.diffusion.noise_schedule import Schedule, snr

DECAYS = ("constant", "exponential", "snr")


def squared(
    schedule: Schedule, t: Num[Array, " B"], prediction: Float[Array, "B ..."], target: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Returns (prediction - target)², float32 [B h w c]."""
    return (prediction - target) ** 2


def huber(
    schedule: Schedule,
    t: Num[Array, " B"],
    prediction: Float[Array, "B ..."],
    target: Float[Array, "B ..."],
    c: float = 0.1,
    decay: str = "snr",
) -> Float[Array, "B ..."]:
    """Returns the pseudo-Huber error 2 c_t (sqrt(d² + c_t²) - c_t), d = prediction - target, float32 [B h w c].

    For |d| far below c_t it is about d², far above about 2 c_t |d|, so outliers and damaged pictures weigh less.
    c_t: threshold at time t, see threshold.
    Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber
    Loss" (arXiv 2403.16728); kohya's sd-scripts for the factor 2 c_t and the defaults.
    """
    at = threshold(schedule, t, c, decay).reshape(-1, *(1,) * (prediction.ndim - 1))
    return 2 * at * (jnp.sqrt((prediction - target) ** 2 + at**2) - at)


def threshold(schedule: Schedule, t: Num[Array, " B"], c: float, decay: str) -> Float[Array, " B"]:
    """Returns the threshold c_t of the pseudo-Huber error, float32 [B].

    decay: "constant", c at all times; "exponential", c^(t / T), which falls from 1 to c; "snr", (1 - c) / (1 +
    sigma_t)² + c with sigma_t² = 1 / SNR_t, which is near 1 at low noise and near c at high noise.
    Source: Khrapov et al. 2024; kohya's sd-scripts.
    """
    time = jnp.asarray(t, jnp.float32)
    if decay == "constant":
        return jnp.full_like(time, c)
    if decay == "exponential":
        return jnp.exp(math.log(c) / schedule.num_train_timesteps * time)
    return (1 - c) / (1 + snr(schedule, t) ** -0.5) ** 2 + c
