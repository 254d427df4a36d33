"""The diffusion loss, which methods use unless they define their own.

    loss, metrics = diffusion_loss(sd, batch, key)
    loss, metrics = diffusion_loss(sd, batch, key, weighting=partial(snr_weight, gamma=5.0))
    loss, metrics = diffusion_loss(sd, batch, key, error=partial(huber, c=0.1), pyramid=0.3)

The `loss` of a method passes other targets, errors, weightings or penalties here.
`sd` provides: schedule, encode(pixels, keys), latents(moments, keys), condition(ids, skip) and
denoise(z, t, cond, i) -> (prediction, aux).
All randomness of an example comes from fold_in(key, its index), so its loss does not depend on the batch, device or
process.  Shapes: B batch, h w latent pixels, c latent channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key, Num

from sdjax import trees
from sdjax.diffusion import noise_schedule, training_noise
from sdjax.diffusion.errors import squared
from sdjax.diffusion.model import Model
from sdjax.diffusion.noise_schedule import Schedule, add_noise, snr
from sdjax.models.cond import Cond, UNetInputs

LOSS_ALONE = ("pixels", "moments", "ids", "class_ids", "text", "index", "weight", "mask")  # not passed to the network
LEAST_SNR = 1e-5  # floor of the debiased weight's SNR, infinite at 0: our choice, below DDPM's schedule, 4e-5
MOST_SNR = 1000.0  # cap of the debiased weight's SNR, as in kohya's: at zero noise the weight would be 0


def diffusion_loss(
    sd: Model,
    batch: Mapping[str, Any],
    key: Key[Array, ""],
    step: Int[Array, ""] | int | None = None,
    *,
    target: Callable = noise_schedule.target,
    error: Callable[[Schedule, Array, Array, Array], Array] = squared,
    weighting: Callable | None = None,
    regularisers: Sequence[Callable] = (),
    noise_offset: float = 0.0,
    pyramid: float = 0.0,
    perturbation: float = 0.0,
    told: Cond = Cond(),  # noqa: B008 a frozen value
    skip: int = 0,
    times: tuple[float, float] = (0.0, 1.0),
) -> tuple[Array, dict[str, Array]]:
    """Returns (mean over the batch of weight * (weighting * error + penalty), metrics), all float32.

    target: target(schedule, z, noise, t) -> the network's target, [B h w c].
    error: error(schedule, t, prediction, target) -> [B h w c], see errors.py; averaged over each example.  With
    batch["mask"] [B h w 1] the average is sum(mask * error) / sum(mask), so a small subject counts as much as a large
    one (our choice; others divide by the whole area).  A mask of zeros gives error 0.
    weighting: weighting(schedule, t) -> [B], factors of the errors, such as snr_weight; None weighs all times equally.
    regularisers: functions (sd, batch, z_t, t, cond, prediction) -> [B], added to the penalty; see preservation.
    penalty: the regularisers plus aux["penalty"] [B] of the conditioners, such as the size of an encoder's offset.
    noise_offset: standard deviation of a constant added to each channel's noise; 0.05 to 0.1 gives darker and brighter
    pictures.
    pyramid: discount of added coarse noise, see training_noise.pyramid; 0 for none.
    perturbation: standard deviation of extra noise in z_t that is not in the target, in units of z_t's noise; 0.1 in
    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv 2301.11706).
    batch: "pixels" [B H W 3] or "moments" [B h w 2c] (mean and log-variance of the unscaled latent), "ids" {text
    encoder: [B L]}, "index" [B], "weight" [B] (1 if absent); everything else goes to the conditioners and wrappers in
    cond.own.
    told: the task's other inputs to the network, besides the prompts.
    skip: number of the text encoder's last layers to skip, clip skip - 1.
    times: the range of the times t that are drawn, as shares of the schedule's; see noise_schedule.bounds.
    """
    k_latent, k_time, k_noise, k_offset = jax.random.split(key, 4)
    index, schedule = batch["index"], sd.schedule
    first, end = noise_schedule.bounds(schedule, times)
    draw_time = jax.vmap(lambda k: jax.random.randint(k, (), first, end))
    z = latents(sd, batch, trees.example_keys(k_latent, index))
    t = draw_time(trees.example_keys(k_time, index))
    noise = training_noise.normal(trees.example_keys(k_noise, index), z.shape[1:])
    if pyramid:
        noise = training_noise.pyramid(noise, trees.example_keys(trees.named_key(key, "pyramid"), index), pyramid)
    if noise_offset:
        noise += noise_offset * training_noise.normal(
            trees.example_keys(k_offset, index), (1,) * (z.ndim - 2) + z.shape[-1:]
        )
    seen = noise
    if perturbation:
        more = trees.example_keys(trees.named_key(key, "perturbation"), index)
        seen = noise + perturbation * training_noise.normal(more, z.shape[1:])

    own = {name: value for name, value in batch.items() if name not in LOSS_ALONE}
    cond = told.over(conditioned(sd, batch, skip)).with_own(**own)
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
    """Returns a regulariser [B]: strength times the mean squared difference from the prediction of `before`.

    before: the model before training; it predicts at the same z_t and t.
    If the batch has class prompts, batch["class_ids"], both models predict from them: DreamBooth's prior preservation
    without class pictures, as ai-toolkit's diff_output_preservation.  Otherwise they use the example's own prompts, as
    in Li and Hoiem 2016, "Learning without Forgetting".
    """

    def regulariser(sd, batch, z_t, t, cond, prediction):
        ids = batch.get("class_ids", batch["ids"])
        if "class_ids" in batch:
            prediction, _ = sd.denoise(z_t, t, sd.condition(ids, cond.skip).over(cond), i=0)
        wanted, _ = before.denoise(z_t, t, before.condition(ids, cond.skip).over(cond), i=0)
        return strength * masked_mean((prediction - jax.lax.stop_gradient(wanted)) ** 2)

    return regulariser


def conditioned(sd: Model, batch: Mapping[str, Any], skip: int = 0) -> Cond:
    """Returns the cond of a batch's prompts, from the cached UNet inputs batch["text"] if it has them."""
    return Cond(UNetInputs(**batch["text"]), skip=skip) if "text" in batch else sd.condition(batch["ids"], skip)


def latents(sd: Model, batch: Mapping[str, Any], keys: Key[Array, " B"]) -> Float32[Array, "B h w c"]:
    """Returns scaled latents [B h w c], sampled from the cached moments or encoded from the pixels.  keys: [B]."""
    z = sd.latents(batch["moments"], keys) if "moments" in batch else sd.encode(batch["pixels"], keys)
    return z.astype(jnp.float32)


def masked_mean(square: Float[Array, "B ..."], mask: Num[Array, "B h w 1"] | None = None) -> Float32[Array, " B"]:
    """Returns the mean over all axes but the batch, weighted by a mask [B h w 1] if given: [B]."""
    axes = tuple(range(1, square.ndim))
    if mask is None:
        return jnp.mean(square, axes)
    area = jnp.broadcast_to(mask.astype(jnp.float32), square.shape)
    return jnp.sum(area * square, axes) / jnp.maximum(jnp.sum(area, axes), 1e-6)


def snr_weight(schedule: Schedule, t: Num[Array, " B"], gamma: float) -> Float32[Array, " B"]:
    """Returns the min-SNR weight of the loss for the network's prediction type, float32 [B].

    It is min(snr, gamma) for x0, min(snr, gamma) / snr for the noise and min(snr, gamma) / (snr + 1) for v.
    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
    """
    ratio = snr(schedule, t)
    if schedule.prediction_type == "epsilon":
        return jnp.minimum(1.0, gamma / ratio)  # finite at zero SNR
    clamped = jnp.minimum(ratio, gamma)
    return clamped / (ratio + 1.0) if schedule.prediction_type == "v_prediction" else clamped


def debiased(schedule: Schedule, t: Num[Array, " B"]) -> Float32[Array, " B"]:
    """Returns the debiased weight, float32 [B]: 1 / sqrt(snr) for noise, 1 / (snr + 1) for v, sqrt(snr) for x0.

    snr is at least LEAST_SNR and at most MOST_SNR.  Noisy times weigh more: there, an error in the noise is a larger
    error in the picture.
    Source: Yu et al. 2023, "Debias the Training of Diffusion Models" (arXiv 2310.08442) for noise; kohya's sd-scripts
    for v.  Our choice for x0: the squared error of the noise is snr times that of x0.
    """
    ratio = jnp.clip(snr(schedule, t), LEAST_SNR, MOST_SNR)
    return {"epsilon": ratio**-0.5, "v_prediction": 1 / (ratio + 1), "sample": ratio**0.5}[schedule.prediction_type]
