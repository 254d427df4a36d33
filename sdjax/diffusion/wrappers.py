"""Wrappers around the network for sampling: mask paste-back, thresholds, guidance, ControlNets.

A wrapper is called as wrapper(sd, call, z, t, cond) -> prediction; call(z, t, cond) runs everything inside it.
Wrappers are sorted by `rank`; 0 is outermost.  They are pytrees: their arrays are arguments of the compiled function,
so another guidance scale or mask does not recompile.  A negative prompt is a whole Cond.

    sd = sd.add(wrappers=Guidance(scale=7.5, negative=sd.condition(sd.tokenize([""]))))

Shapes: B batch, h w latent pixels, c latent channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, ArrayLike, Float, Float32, Num

from sdjax.diffusion import noise_schedule
from sdjax.diffusion.model import Cond, Model, Predict
from sdjax.models import hooks

PASTE_BACK, THRESHOLD, GUIDANCE, CONTROLNET = range(4)  # ranks, outermost first
NO_PICTURE = (
    "a ControlNet without a picture: expected data.condition=canny in training, control.on(picture) in sampling"
)


class Guidance(struct.PyTreeNode):
    """Classifier-free guidance: negative + scale (positive - negative), in one call of 2B rows, negative ones first.

    scale, rescale: one number, or one per example [B].
    negative: a Cond of B rows; inputs in only one of the two Conds are used for both.  cond.negative, from a
    conditioner that changes it in a step, replaces it.
    Several prompts: cond.also is a tuple of further Conds, and cond.share [B prompts] holds the weights w of all
    prompts.  positive is then negative + sum of w (their prediction - negative), in one call of all rows.
    rescale: 0 to 1, how far the standard deviation moves to that of the positive prediction (0.7 in the paper).
    first, last: guidance acts at times first <= t <= last; at other times the positive prediction is used alone.
    Source: Ho and Salimans 2022, equation 6; rescale: Lin et al. 2023, section 3.4; interval: Kynkäänniemi et al. 2024;
    several prompts: Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models", equation 11.
    """

    scale: Any
    negative: Any
    rescale: Any = 0.0
    first: Any = 0.0
    last: Any = jnp.inf
    rank: int = struct.field(pytree_node=False, default=GUIDANCE)

    def __call__(
        self, sd: Model, call: Predict, z: Float[Array, "B h w c"], t: Num[Array, " B"], cond: Cond
    ) -> Float[Array, "B h w c"]:
        unwanted, share = self.negative if cond.negative is None else cond.negative.over(self.negative), cond.share
        wanted = cond.over(unwanted)
        conds = [unwanted.over(cond), wanted, *(one.over(wanted) for one in cond.also)]
        count = len(conds)
        negative, positive, *others = jnp.split(call(_stack(*[z] * count), _stack(*[t] * count), _stack(*conds)), count)
        if share is not None:
            share = share.reshape(*share.shape, *[1] * (z.ndim - 1))  # [B prompts 1 1 1]
            each = enumerate((positive, *others))
            positive = negative + sum(share[:, k] * (prediction - negative) for k, prediction in each)
        scale, rescale, inside = (
            jnp.reshape(x, (-1, *[1] * (z.ndim - 1)))
            for x in (self.scale, self.rescale, (self.first <= t) & (t <= self.last))
        )
        guided = rescaled(negative + scale * (positive - negative), positive, rescale)
        return jnp.where(inside, guided, positive)


def rescaled(
    guided: Float[Array, "B ..."], positive: Float[Array, "B ..."], amount: Float[ArrayLike, "..."]
) -> Float[Array, "B ..."]:
    """Returns `guided` with each example's standard deviation moved by `amount` (0 to 1) towards that of `positive`.

    Source: Lin et al. 2023, equations 15 and 16.
    """
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(positive, axes, keepdims=True) / jnp.maximum(jnp.std(guided, axes, keepdims=True), 1e-12)
    return guided * (amount * ratio + (1 - amount))


class Threshold(struct.PyTreeNode):
    """Dynamic thresholding of the clean latent that a prediction implies; see `thresholded`.

    The method was made for pictures in [-1, 1] with limit = 1; scaled latents have standard deviation 1 and no bounds.
    """

    percentile: Any
    limit: Any
    rank: int = struct.field(pytree_node=False, default=THRESHOLD)

    def __call__(
        self, sd: Model, call: Predict, z: Float[Array, "B h w c"], t: Num[Array, " B"], cond: Cond
    ) -> Float[Array, "B h w c"]:
        x0 = noise_schedule.to_x0(sd.schedule, call(z, t, cond), z, t)
        return noise_schedule.from_x0(sd.schedule, thresholded(x0, self.percentile, self.limit), z, t)


def thresholded(
    x0: Float[Array, "B ..."], percentile: Float[ArrayLike, ""], limit: Float[ArrayLike, ""]
) -> Float[Array, "B ..."]:
    """Returns clip(x0, -s, s) limit / s per example; s is the `percentile` (0 to 1) of |x0|, at least `limit`.

    x0: [B ...].  Values within the limit do not change if the percentile is within it too.
    Source: Saharia et al. 2022 (Imagen), section 2.3, where limit is 1.
    """
    highest = jnp.quantile(jnp.abs(x0).reshape(len(x0), -1), percentile, axis=1)
    highest = jnp.maximum(highest, limit).reshape(-1, *[1] * (x0.ndim - 1))
    return jnp.clip(x0, -highest, highest) * (limit / highest)


class KnownRegion(struct.PyTreeNode):
    """Inpainting with a model without mask inputs: outside the mask the network sees and predicts the given picture.

    mask: [B h w 1], 1 where to paint, 0 where `z` is known; values between blend.
    z: scaled latents of the given picture [B h w c].  noise: the sampler's start noise [B h w c].
    Before each call, the known region is set to the given picture with the current time's noise.  After it, the
    prediction there is replaced by the one that implies the given picture.  The caller pastes pixels back after
    decoding.
    """

    mask: Any
    z: Any
    noise: Any
    rank: int = struct.field(pytree_node=False, default=PASTE_BACK)

    def __call__(
        self, sd: Model, call: Predict, z: Float[Array, "B h w c"], t: Num[Array, " B"], cond: Cond
    ) -> Float[Array, "B h w c"]:
        known = noise_schedule.add_noise(sd.schedule, self.z, self.noise, t)
        seen = self.mask * z + (1 - self.mask) * known
        x0 = noise_schedule.to_x0(sd.schedule, call(seen, t, cond), seen, t)
        return noise_schedule.from_x0(sd.schedule, self.mask * x0 + (1 - self.mask) * self.z, z, t)


class ControlNet(struct.PyTreeNode):
    """Adds the outputs of a ControlNet to the UNet's feature maps; several ControlNets add up.

    cond.own[name] holds "hint", pictures [B H W 3] in [0, 1], and "weight" [B], 1 if absent.  The network does not run
    if all weights are 0.  Raises ValueError without a hint.
    guess: act only on rows with cond.own["positive"] [B] = 1, and less on fine maps (see guess_scales).
    soft: act less on fine maps, on all rows (A1111's "My prompt is more important").
    network: the Linen module of params.
    """

    params: Any
    name: str = struct.field(pytree_node=False, default="control")
    network: Any = struct.field(pytree_node=False, default=None)
    guess: bool = struct.field(pytree_node=False, default=False)
    soft: bool = struct.field(pytree_node=False, default=False)
    rank: int = struct.field(pytree_node=False, default=CONTROLNET)

    def __call__(
        self, sd: Model, call: Predict, z: Float[Array, "B h w c"], t: Num[Array, " B"], cond: Cond
    ) -> Float[Array, "B h w c"]:
        if "hint" not in cond.own.get(self.name, {}):
            raise ValueError(NO_PICTURE)
        own = cond.own[self.name]
        weight = own.get("weight", jnp.ones(len(z))) * (cond.own["positive"] if self.guess else 1)
        inputs = z, t, cond.unet.context, own["hint"], cond.unet.labels

        def run(inputs):
            maps, middle = hooks.apply("controlnet", self.network, self.params, sd.hooks, *inputs, cond=cond)
            scales = guess_scales(len(maps) + 1) if self.guess or self.soft else np.ones(len(maps) + 1, np.float32)
            *maps, middle = (
                (weight.reshape(-1, 1, 1, 1) * scale).astype(x.dtype) * x
                for x, scale in zip((*maps, middle), scales, strict=True)
            )
            return tuple(maps), middle

        def nothing(inputs):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, inputs))

        always = "weight" not in own and not self.guess  # in training
        made = run(inputs) if always else jax.lax.cond(jnp.any(weight != 0), run, nothing, inputs)
        if cond.unet.residuals is not None:
            made = jax.tree.map(jnp.add, cond.unet.residuals, made)
        return call(z, t, cond.with_unet(residuals=made))


def guess_scales(count: int) -> Float32[np.ndarray, " count"]:
    """Returns the factors of `count` residuals in guess mode: a geometric series from 0.1 (finest map) to 1.

    Source: the ControlNet repository's guess mode, and diffusers' torch.logspace(-1, 0, count).
    """
    return np.logspace(-1, 0, count, dtype=np.float32)


def mask_channels(mask: Num[Array, "B h w 1"], masked_z: Float[Array, "B h w c"]) -> Float[Array, "B h w 1+c"]:
    """Returns the extra inputs of a 9-channel inpainting network, [B h w 5]: mask, then latent of the masked picture.

    mask: [B h w 1], 1 where to paint, from the pixels' mask by nearest neighbour.  masked_z: scaled latents [B h w 4]
    of the picture with 0 (mid-grey) where to paint.  Source: the original stable-diffusion inpainting checkpoints.
    """
    return jnp.concatenate([mask.astype(masked_z.dtype), masked_z], axis=-1)


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
