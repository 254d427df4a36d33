"""The training loss of every method that does not bring its own.

    loss, metrics = diffusion_loss(sd, batch, key)
    loss, metrics = diffusion_loss(sd, batch, key, weighting=partial(snr_weight, gamma=5.0))
    loss, metrics = diffusion_loss(sd, batch, key, error=partial(huber, c=0.1), pyramid=0.3)

A method of another target, error, weighting or penalty calls it with its own, as its `loss`.
`sd` needs: schedule, encode(pixels, keys), latents(moments, keys), condition(ids) and
denoise(z, t, cond, i) -> (prediction, aux).
Everything random about an example comes from fold_in(key, its index), so its loss does not depend on the batch, the
device or the process that it sits in.  Shapes: B batch, h w latent pixels, c latent channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key, Num

from sdjax import trees
from sdjax.diffusion import noise as noises
from sdjax.diffusion import schedule as noising
from sdjax.diffusion.errors import squared
from sdjax.diffusion.model import Model
from sdjax.diffusion.schedule import Schedule, add_noise, snr
from sdjax.models.cond import Cond

LOSS_ALONE = ("pixels", "moments", "ids", "class_ids", "index", "weight", "mask")  # no concern of the network
MOST_SNR = 1000.0  # of the debiased weight, which at time 0 of a schedule without noise would be 0; as kohya has it


def diffusion_loss(
    sd: Model,
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    step: Int[Array, ""] | int | None = None,
    *,
    target: Callable = noising.target,
    error: Callable[[Schedule, Array, Array, Array], Array] = squared,
    weighting: Callable | None = None,
    regularisers: Sequence[Callable] = (),
    noise_offset: float = 0.0,
    pyramid: float = 0.0,
    perturbation: float = 0.0,
    told: Cond = Cond(),  # noqa: B008 a frozen value
) -> tuple[Array, dict[str, Array]]:
    """Returns (mean over the batch of weight * (weighting * error + penalty), metrics), all float32.

    target: target(schedule, z, noise, t), what the network shall predict [B h w c].
    error: error(schedule, t, prediction, target) of every number, see errors.py; its mean over one example counts, or
    over the area of batch["mask"] [B h w 1] where there is one: sum(mask * error) / sum(mask), so that a small subject
    counts as much as a large one (our choice; dividing by the whole area is the other custom).  A mask of zeros gives
    no error.
    weighting: weighting(schedule, t) [B], factors of the errors, such as snr_weight; None: all times alike.
    regularisers: each (sd, batch, z_t, t, cond, prediction) -> [B], added to the penalty; see preservation.
    penalty: with them aux["penalty"] [B] of the conditioners, e.g. the size of an encoder's offset.
    noise_offset: standard deviation of a constant added to each channel's noise, 0.05 to 0.1 for darker and brighter
    pictures.
    pyramid: discount of coarser noise that is added, see noise.pyramid; 0 for none.
    perturbation: deviation of further noise that z_t has and the target does not, 0.1 in Ning et al. 2023, "Input
    Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv 2301.11706).
    batch: "pixels" [B H W 3] or "moments" [B h w 2c] (mean and log-variance of the unscaled latent), "ids" [B L],
    "index" [B], "weight" [B] if not all 1; whatever else it holds goes to the conditioners and wrappers in cond.own.
    told: what the task tells the network beside the words.
    """
    k_latent, k_time, k_noise, k_offset = jax.random.split(key, 4)
    index, schedule = batch["index"], sd.schedule
    draw_time = jax.vmap(lambda k: jax.random.randint(k, (), 0, schedule.num_train_timesteps))
    z = latents(sd, batch, trees.example_keys(k_latent, index))
    t = draw_time(trees.example_keys(k_time, index))
    noise = noises.normal(trees.example_keys(k_noise, index), z.shape[1:])
    if pyramid:
        noise = noises.pyramid(noise, trees.example_keys(trees.named_key(key, "pyramid"), index), pyramid)
    if noise_offset:
        noise += noise_offset * noises.normal(trees.example_keys(k_offset, index), (1,) * (z.ndim - 2) + z.shape[-1:])
    seen = noise
    if perturbation:
        more = trees.example_keys(trees.named_key(key, "perturbation"), index)
        seen = noise + perturbation * noises.normal(more, z.shape[1:])

    own = {name: value for name, value in batch.items() if name not in LOSS_ALONE}
    cond = told.over(sd.condition(batch["ids"])).with_own(**own)
    z_t = add_noise(schedule, z, seen, t)
    prediction, aux = sd.denoise(z_t, t, cond, i=0)
    wrong = error(schedule, t, prediction.astype(jnp.float32), target(schedule, z, noise, t))
    wrong = masked_mean(wrong, batch.get("mask"))
    penalty = jnp.broadcast_to(jnp.asarray(aux.get("penalty", 0.0), jnp.float32), wrong.shape)
    for regulariser in regularisers:
        penalty += regulariser(sd, batch, z_t, t, cond, prediction)
    factor = 1.0 if weighting is None else weighting(schedule, t)
    loss = jnp.mean(batch.get("weight", 1.0) * (factor * wrong + penalty))
    return loss, {"error": jnp.mean(wrong), "penalty": jnp.mean(penalty)}


def preservation(strength: float, before: Model) -> Callable:
    """Returns a regulariser that holds on to what a model predicted before training: strength times the mean squared
    difference from `before`'s prediction at the same z_t and t, [B].

    Both predict from batch["class_ids"], the prompts of the class, where there are such: DreamBooth's prior
    preservation without class pictures, as ai-toolkit's diff_output_preservation.  Else from the example's own prompts,
    in the manner of Li and Hoiem 2016, "Learning without Forgetting".
    """

    def regulariser(sd, batch, z_t, t, cond, prediction):
        ids = batch.get("class_ids", batch["ids"])
        if "class_ids" in batch:
            prediction, _ = sd.denoise(z_t, t, sd.condition(ids).over(cond), i=0)
        wanted, _ = before.denoise(z_t, t, before.condition(ids).over(cond), i=0)
        return strength * masked_mean((prediction - jax.lax.stop_gradient(wanted)) ** 2)

    return regulariser


def latents(sd: Model, batch: Mapping[str, Any], keys: Key[Array, " B"]) -> Float32[Array, "B h w c"]:
    """Returns scaled latents [B h w c], drawn from the cached moments or encoded from the pixels.  keys: [B]."""
    z = sd.latents(batch["moments"], keys) if "moments" in batch else sd.encode(batch["pixels"], keys)
    return z.astype(jnp.float32)


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


def debiased(schedule: Schedule, t: Num[Array, " B"]) -> Float32[Array, " B"]:
    """Returns 1 / sqrt(snr); 1 / (snr + 1) of models that predict v, sqrt(snr) of x0.  float32 [B], snr <= MOST_SNR.

    Times of much noise count more: an error of the noise there is a larger error of the picture.
    Source: Yu et al. 2023, "Debias the Training of Diffusion Models" (arXiv 2310.08442), for models that predict the
    noise; that of v is kohya's sd-scripts', that of x0 ours: an error of the noise is snr times one of x0.
    """
    ratio = jnp.minimum(snr(schedule, t), MOST_SNR)
    return {"epsilon": ratio**-0.5, "v_prediction": 1 / (ratio + 1), "sample": ratio**0.5}[schedule.prediction_type]
