"""The training loss of every method that does not bring its own.

    loss, metrics = diffusion_loss(sd, batch, key, min_snr=5.0)

`sd` needs: schedule, encode(pixels, keys), latents(moments, keys), condition(ids) and
denoise(z, t, cond, i) -> (prediction, aux).
Everything random about an example comes from fold_in(key, its index), so its loss does not depend on the batch, the
device or the process that it sits in.  Shapes: B batch, h w latent pixels, c latent channels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key, Num

from sdjax import trees
from sdjax.diffusion.model import Model
from sdjax.diffusion.schedule import Schedule, add_noise, snr, target


def diffusion_loss(
    sd: Model,
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    step: Int[Array, ""] | int | None = None,
    *,
    min_snr: float | None = None,
    noise_offset: float = 0.0,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Returns (mean over the batch of weight * (error + penalty), metrics), all float32.

    error: the mean squared error of the prediction of one example; over the area of batch["mask"] [B h w 1] where there
    is one: sum(mask * square) / sum(mask), so that a small subject counts as much as a large one (our choice; dividing
    by the whole area is the other custom).  A mask of zeros gives no error.
    penalty: aux["penalty"] [B] of the conditioners, e.g. the size of an encoder's offset.
    min_snr: gamma, usually 5; weighs errors by the clamped signal-to-noise ratio (see snr_weight).  None: all times
    alike.
    noise_offset: standard deviation of a constant added to each channel's noise, 0.05 to 0.1 for darker and brighter
    pictures.
    batch: "pixels" [B H W 3] or "moments" [B h w 2c] (mean and log-variance of the unscaled latent), "ids" [B L],
    "index" [B], "weight" [B] if not all 1; whatever else it holds goes to the conditioners and wrappers through cond.
    """
    k_latent, k_time, k_noise, k_offset = jax.random.split(key, 4)
    index, schedule = batch["index"], sd.schedule
    draw_time = jax.vmap(lambda k: jax.random.randint(k, (), 0, schedule.num_train_timesteps))
    z = latents(sd, batch, trees.example_keys(k_latent, index))
    t = draw_time(trees.example_keys(k_time, index))
    noise = draw(trees.example_keys(k_noise, index), z.shape[1:])
    if noise_offset:
        noise += noise_offset * draw(trees.example_keys(k_offset, index), (1,) * (z.ndim - 2) + z.shape[-1:])

    cond = {**batch, **sd.condition(batch["ids"])}
    prediction, aux = sd.denoise(add_noise(schedule, z, noise, t), t, cond, i=0)
    square = (prediction.astype(jnp.float32) - target(schedule, z, noise, t)) ** 2
    error = masked_mean(square, batch.get("mask"))
    penalty = jnp.broadcast_to(jnp.asarray(aux.get("penalty", 0.0), jnp.float32), error.shape)
    factor = 1.0 if min_snr is None else snr_weight(schedule, t, min_snr)
    loss = jnp.mean(batch.get("weight", 1.0) * (factor * error + penalty))
    return loss, {"error": jnp.mean(error), "penalty": jnp.mean(penalty)}


def latents(sd: Model, batch: Mapping[str, Any], keys: Key[Array, " B"]) -> Float32[Array, "B h w c"]:
    """Returns scaled latents [B h w c], drawn from the cached moments or encoded from the pixels.  keys: [B]."""
    z = sd.latents(batch["moments"], keys) if "moments" in batch else sd.encode(batch["pixels"], keys)
    return z.astype(jnp.float32)


def draw(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float32[Array, "B ..."]:
    """Returns one standard normal array per key, float32 [B *shape]."""
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


def masked_mean(square: Float[Array, "B ..."], mask: Num[Array, "B h w 1"] | None = None) -> Float32[Array, " B"]:
    """Returns the mean over everything behind the batch axis, weighted by mask [B h w 1] where given.  [B]"""
    axes = tuple(range(1, square.ndim))
    if mask is None:
        return jnp.mean(square, axes)
    area = jnp.broadcast_to(mask.astype(jnp.float32), square.shape)
    return jnp.sum(area * square, axes) / jnp.maximum(jnp.sum(area, axes), 1e-6)


def snr_weight(schedule: Schedule, t: Num[Array, " B"], gamma: float) -> Float32[Array, " B"]:
    """Returns min(snr, gamma) in units of the network's own weighting, float32 [B].

    An error of x0 counts min(snr, gamma); an error of the noise is snr times, one of v is snr + 1 times that of x0.
    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
    """
    ratio = snr(schedule, t)
    if schedule.prediction_type == "epsilon":
        return jnp.minimum(1.0, gamma / ratio)  # finite at zero SNR
    clamped = jnp.minimum(ratio, gamma)
    return clamped / (ratio + 1.0) if schedule.prediction_type == "v_prediction" else clamped
