"""Computes the latents of a job: encodes prompts, adds wrappers, runs the sampler.

Another prompt, seed, guidance, strength, step count or sampler does not recompile; another size, batch or use of fresh
noise does.

Shapes: B batch, h w latent pixels, c latent channels.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from sdjax.diffusion.plan import begin, guided_times, sample, tabulate, walk
from sdjax.diffusion.wrappers import Guidance, KnownRegion, Threshold, mask_channels
from sdjax.models.cond import Cond
from sdjax.runtime import replicas
from sdjax.sampling import control, finite, memory
from sdjax.sampling.job import Cancelled, Job, Progress, split_keys
from sdjax.sampling.latents import decode, encode
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.text import conditioning, grammars


def run(
    sd: StableDiffusion,
    job: Job,
    start: Float[Array, "B h w c"],
    *,
    z: Float[Array, "B h w c"] | None = None,
    skipped: int = 0,
    cond: Cond | None = None,
    region: KnownRegion | None = None,
    before: Job | None = None,
) -> Float[Array, "B h w c"]:
    """Returns the scaled latents [B h w c] of a job.

    start: standard normal noise [B h w c].  z: start latents of image-to-image, which skips `skipped` steps.
    cond: overrides the prompts' Cond, on both sides of guidance.  region: a KnownRegion of B pictures.
    before: the first of two passes; step numbers in prompts also count its steps.
    Prompts of several lengths (conditioning.sizes) run one length at a time, each filled up to B.  So no prompt is
    padded for another, and all batches share one program per length.
    Raises ValueError for an unknown sampler or schedule, for channels that the network does not support, for
    insufficient memory, and, naming the step, for a latent that is not finite.
    """
    rows = {"start": start, "z": z, "cond": cond, "region": region}
    groups = _groups(sd, job, before)
    if len(groups) == 1:
        return _run(sd, job, **rows, skipped=skipped, before=before)
    made = np.zeros(start.shape, np.float32)
    for group in groups:
        places = np.resize(group, len(start))
        some = jax.tree.map(lambda x: x[places], rows)  # noqa: B023
        made[places] = _run(sd, _part(job, places), **some, skipped=skipped, before=before)
    return jnp.asarray(made)


def guided(job: Job) -> bool:
    """Returns whether the negative side is needed: for guidance, or for AND, which is relative to it."""
    shared = job.settings
    return shared.guidance != 1 or shared.grammar == "a1111" and any(map(grammars.weighed, job.each("prompt")))


def late(job: Job, strength: float | None = None, name: str = "strength") -> int:
    """Returns the number of steps that image-to-image skips at the noisy end: steps - int(steps * strength).

    strength: None for the job's own.
    Raises SettingError, naming the strength, if no step would be left.
    """
    steps, strength = job.settings.steps, job.settings.strength if strength is None else strength
    kept = min(int(steps * strength), steps)
    if not kept:
        raise SettingError(name, strength, f"at least {1 / steps:.3g}", f"none of {steps} steps is left")
    return steps - kept


def _groups(sd, job, before):
    """Returns the indices of the prompts, grouped by length."""
    shared = job.settings
    if shared.grammar == "plain" or not sd.tokenizers:
        return [range(len(job.pictures))]
    unwanted, groups = job.each("negative_prompt") if guided(job) else None, {}
    how = dict(steps=shared.steps, grammar=shared.grammar)
    sizes = conditioning.sizes(sd, job.each("prompt"), unwanted, before=_steps(before), **how)
    for place, size in enumerate(sizes):
        groups.setdefault(size, []).append(place)
    return list(groups.values())


def _steps(before):
    """Returns the number of steps of the first pass, or None."""
    return None if before is None else before.settings.steps


def _part(job, places):
    """Returns the job of a subset of a job's pictures, without `noise`, which the caller gives."""
    pictures = tuple(job.pictures[i] for i in places)
    return dataclasses.replace(job, pictures=pictures, noise=None, control=[_seen(one, places) for one in job.control])


def _seen(one, places):
    """Returns the Control for a subset of a batch."""
    many = isinstance(one.picture, (list, tuple)) or np.ndim(one.picture) == 4
    if not many or len(one.picture) == 1:
        return one
    return dataclasses.replace(one, picture=[one.picture[i] for i in places])


def _run(sd, job, start, z, cond, region, *, skipped, before):
    shared = job.settings
    churn = shared.churn, shared.churn_low, shared.churn_high, shared.churn_noise
    plan = tabulate(sd.schedule, shared.sampler, shared.steps, shared.schedule, shared.eta, skipped, churn)
    sd, place = replicas.share(sd, len(start))
    start = place(start)
    sides, count = start.shape[1:3], len(start) // replicas.count(start)
    parts = conditioning.most_parts(job.each("prompt"), shared.grammar) if guided(job) else 0
    memory.check(sd, sides, count * (1 + parts), controls=len(job.control))
    if region is not None:
        sd = sd.add(wrappers=region)
    sd, own, negative = _texts(sd, job, before)
    cond = own if cond is None else cond.over(own).replace(also=own.also, share=own.share, negative=own.negative)
    cond = cond.with_unet(channels=_extra_channels(sd, job, start, cond.unet.channels))
    size = tuple(side * sd.factor for side in sides)
    sd, cond, negative = control.with_controls(sd, job.control, cond, negative, int(plan.steps), size)
    if negative is not None:
        times = guided_times(plan, shared.guidance_start, shared.guidance_end)
        sd = sd.add(wrappers=Guidance(np.float32(shared.guidance), place(negative), np.float32(shared.rescale), *times))
    if shared.threshold:
        sd = sd.add(wrappers=Threshold(np.float32(shared.threshold), np.float32(shared.threshold_limit)))
    fresh = None
    if plan.stochastic:
        fresh = job.step_noise(start.shape[1:], plan.draws)
    cond, keys, z = place((cond, job.keys, z))
    with memory.told(size, count):
        if not job.progress and job.watch is None:
            made, lost = jax.block_until_ready(_sample(sd.bare, cond, start, keys, plan, z, fresh))
        else:
            with tqdm(
                total=int(plan.rows), desc="sampling", unit="step", dynamic_ncols=True, disable=not job.progress
            ) as bar:
                made, lost = _watched(sd.bare, cond, start, keys, plan, z, fresh, bar, job.watch, place)
    dtype = jnp.dtype(sd.networks["unet"].dtype).name
    advice = f"finite weights, and guidance={shared.guidance:g} and dtype={dtype} that suit them"
    return finite.latents(made, lost, int(plan.steps), advice)


def _watched(sd, cond, start, keys, plan, z, fresh, bar, watch, place):
    """Returns (latents, lost) of a plan that the host runs step by step; a step runs while `watch` sees the last one.

    place: lays out the state over devices as for the first step; otherwise the second would compile another program.
    """
    steps, state, before = int(plan.steps), place(_begin(start, jax.random.clone(keys), plan, z, fresh)), None
    ends = [0, *np.searchsorted(plan.step[: plan.rows], np.arange(1, steps)), int(plan.rows)]
    for done, (first, last) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        own = jax.random.clone(keys)  # calls derive different numbers from the same keys
        state = place(_advance(sd, cond, state, own, plan, fresh, np.int32(first), np.int32(last)))
        _look(sd, before, done, steps, watch)
        bar.update(int(last - first))
        before = jax.block_until_ready(state) if done + 1 == steps else state
    _look(sd, before, steps, steps, watch)
    return state[0], state[3]


def _look(sd, state, done, steps, watch):
    """Waits for a state and shows it to the watcher; raises Cancelled if the watcher returns true."""
    if state is None:
        return
    jax.block_until_ready(state)
    if watch is not None and watch(Progress(done, steps, lambda: decode(sd, state[2][0]), state[2][0])):
        raise Cancelled(f"cancelled after {done} of {steps} steps")


def _texts(sd, job, before):
    """Returns (sd, cond, negative); negative is None without guidance."""
    if not sd.tokenizers:
        if job.settings.guidance != 1:
            raise SettingError("guidance", job.settings.guidance, "1", "LDM-SR reads no words to be guided by")
        return sd, Cond(), None
    shared, prompts, negative = job.settings, job.each("prompt"), job.each("negative_prompt")
    skip = skipped(sd, shared.clip_skip)
    if shared.grammar != "plain":
        how: dict[str, Any] = dict(steps=shared.steps, skip=skip, grammar=shared.grammar, weighting=shared.weighting)
        return conditioning.condition(sd, prompts, negative if guided(job) else None, before=_steps(before), **how)
    cond = encoded(sd, prompts, shared)
    unwanted = encoded(sd, negative, shared) if guided(job) else None
    remade = [item for conditioner in sd.conditioners for item in conditioner.remade.items()]
    if unwanted is not None and any(np.isin(unwanted.words[encoder]["ids"], ids).any() for encoder, ids in remade):
        cond = cond.replace(negative=unwanted)
    return sd, cond, unwanted


def skipped(sd: StableDiffusion, clip_skip: int) -> int:
    """Returns how many of the text encoders' last layers a clip skip leaves out.

    Raises SettingError for a clip skip beyond the number of layers.
    """
    layers = min(sd.networks[encoder].config.num_hidden_layers for encoder in sd.tokenizers)
    if clip_skip > layers:
        raise SettingError("clip_skip", clip_skip, f"1 to {layers}, the layers of the text encoder")
    return clip_skip - 1


def encoded(sd: StableDiffusion, prompts: Sequence[str], made: Any) -> Cond:
    """Returns the cond of a list of prompts, from the text encoder layer in the settings."""
    return _condition(sd.bare, sd.tokenize(prompts), made.clip_skip - 1)


def _extra_channels(sd, job, start, extra):
    """Returns the UNet's extra channels; an inpainting model without given ones gets a mask of the whole picture."""
    taken, latent = sd.networks["unet"].config.in_channels, start.shape[-1]
    given = 0 if extra is None else extra.shape[-1]
    if extra is None and taken == 2 * latent + 1:
        grey = np.full((len(start), *(side * sd.factor for side in start.shape[1:3]), 3), 127.5, np.float32)
        return mask_channels(jnp.ones((*start.shape[:3], 1)), encode(sd, grey, job.keys))
    if latent + given != taken:
        raise ValueError(
            f"the UNet takes {taken} channels, this task has {latent} + {given}: expected a model for this task"
        )
    return extra


@functools.partial(jax.jit, static_argnames="skip")
def _condition(sd, ids, skip):
    return sd.condition(ids, skip)


@jax.jit
def _sample(sd, cond, start, keys, plan, z, fresh):
    return sample(_denoiser(sd, cond), start, plan, split_keys(keys)[1], z=z, step_noise=fresh)


@jax.jit
def _begin(start, keys, plan, z, fresh):
    return begin(start, plan, split_keys(keys)[1], z=z, step_noise=fresh)


@jax.jit
def _advance(sd, cond, state, keys, plan, fresh, first, last):
    return walk(_denoiser(sd, cond), state, plan, first, last, split_keys(keys)[1], step_noise=fresh)


def _denoiser(sd, cond):
    return lambda z, t, i: sd.denoise(z, t, cond, i)[0]
