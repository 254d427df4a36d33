"""Words in, pictures out.

    images = text2img(sd, ["a photo of a face"], seeds=[0], steps=20, guidance=7.5)     # uint8 [B H W 3]
    images = img2img(sd, ["a sketch of a face"], images, strength=0.6)

Every task is a Job, which says how to sample, and one call of `run`; inpainting.py, upscaling.py and slerp.py stand on
the same two.  Image i depends on its own prompt, picture and seed, never on the batch that it is made in.  Another
prompt, seed, guidance, strength or number of steps compiles nothing, nor does another sampler of the same kind of
noise; another size or batch does.

Shapes: B batch, H W pixels, h w latent pixels, c latent channels.
"""

import dataclasses
import functools
import math
import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sdjax.diffusion.samplers import sigmas
from sdjax.diffusion.samplers.plan import SAMPLERS, guided_times, sample, tabulate
from sdjax.diffusion.wrappers import ExtraChannels, Guidance, Threshold, mask_channels
from sdjax.images.resize import fitted, pad
from sdjax.runtime import replicas
from sdjax.sampling import control, finite, foreign_noise, memory, slerp, tiles
from sdjax.stable_diffusion import to_pictures, to_pixels
from sdjax.text import conditioning, grammars

ANY, POSITIVE = math.inf, np.finfo(np.float32).tiny  # the least float32 above 0
LARGEST = float(np.finfo(np.float32).max)  # what a device computes with
SEEDS = -(1 << 63), (1 << 64) - 1  # as PyTorch takes them
# Lowest and highest value of each number of a Job, None where None is one too; ANY itself is no guidance.
RANGES = {"guidance": (-ANY, ANY), "eta": (0, 1), "rescale": (0, 1), "guidance_start": (0, 1), "guidance_end": (0, 1)}
RANGES |= {"threshold": (0, 1), "threshold_limit": (POSITIVE, ANY), "churn": (0, ANY), "churn_noise": (0, ANY)}
RANGES |= {"churn_low": (0, ANY), "churn_high": (0, ANY)}
COUNTS = {"steps": 1, "skip": 0, "ensd": -ANY}  # whole numbers and the lowest of each
NAMES = {"sampler": SAMPLERS, "schedule": (*sigmas.SPACINGS, "automatic"), "grammar": conditioning.GRAMMARS}
NAMES |= {"weighting": conditioning.WEIGHTINGS, "noise_source": foreign_noise.SOURCES}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to make and how to sample it: the arguments that all tasks share, checked and one per picture.

    prompts, negative, seeds: one text or int, or one per picture; seeds count from 0 where None.
    A seed has 64 bits; -1, -2, ... are 2^32 - 1, 2^32 - 2, ...
    guidance: 1 for none.  rescale: of guidance, 0 to 1.
    guidance_start, guidance_end: guidance acts in the steps between these fractions of the run; elsewhere the negative
    prompt has no say.
    threshold: percentile of dynamic thresholding, 0 to 1, 0 for none; threshold_limit: what is never clipped, in
    standard deviations of latents; see wrappers.thresholded.
    noise: standard normal [B h w c] in place of the seeds'.  eta: fresh noise of samplers that take it.
    churn, churn_low, churn_high, churn_noise: s_churn, s_tmin, s_tmax, s_noise of Karras et al. 2022, for euler, heun.
    skip: the text encoder's last layers left out ("clip skip 2" is 1).
    grammar: plain, a1111 or comfyui: what brackets and the like in prompts mean, see text/conditioning.py.
    weighting: how weights in prompts act, a1111 or comfyui; None is the grammar's own, and plain has none.
    noise_source: jax, torch-cpu or philox: whose numbers a seed stands for, see foreign_noise.py.
    ensd: A1111's, added to the seed for fresh noise of the other sources.
    control: ControlNets with their pictures, see control.Control.
    variation: (seed, amount 0 to 1), the share of another seed's noise in the start; see mixing.slerp.
    progress: a bar over the steps.
    Raises ValueError for counts that differ, unknown names, numbers out of range (see RANGES), for an ensd where JAX
    draws, and for a weighting where no prompt has weights.
    """

    prompts: list
    seeds: object = None
    steps: int = 20
    guidance: float = 7.5
    sampler: str = "ddim"
    schedule: str = "normal"
    negative: object = ""
    noise: object = None
    eta: float | None = None
    skip: int = 0
    rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    threshold: float = 0.0
    threshold_limit: float = 3.0
    churn: float = 0.0
    churn_low: float = 0.0
    churn_high: float = 999.0
    churn_noise: float = 1.0
    grammar: str = "plain"
    weighting: str | None = None
    noise_source: str = "jax"
    ensd: int = 0
    control: tuple = ()
    variation: tuple = (0, 0.0)
    progress: bool = False

    def __post_init__(self):
        prompts = [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)
        seeds = range(len(prompts)) if self.seeds is None else self.seeds
        seeds = [seeds] if np.ndim(seeds) == 0 else list(seeds)
        negative = [self.negative] * len(prompts) if isinstance(self.negative, str) else list(self.negative)
        if not prompts or not len(prompts) == len(seeds) == len(negative):
            raise ValueError(
                f"{len(prompts)} prompts, {len(seeds)} seeds, {len(negative)} negative prompts: expected as many"
            )
        _check(self, seeds)
        if self.ensd and self.noise_source == "jax":
            raise ValueError(f"ensd={self.ensd}: noise_source='jax' has none; expected 0, or torch-cpu or philox")
        if not 0 <= self.guidance_start < self.guidance_end <= 1:
            pair = f"guidance_start={self.guidance_start}, guidance_end={self.guidance_end}"
            raise ValueError(f"{pair}: expected 0 <= start < end <= 1")
        if self.weighting and self.grammar == "plain":
            raise ValueError(f"weighting={self.weighting!r}: grammar='plain' has no weights; expected a1111 or comfyui")
        controls = (self.control,) if isinstance(self.control, control.Control) else tuple(self.control)
        seeds = [operator.index(seed) for seed in seeds]  # of Python, which have room for sums
        for name, value in (("prompts", prompts), ("seeds", seeds), ("negative", negative), ("control", controls)):
            object.__setattr__(self, name, value)

    @property
    def keys(self):
        """One key per picture [B]: of the seed's low 32 bits, with the high ones folded in where they are not 0."""
        words = [seed if abs(seed) >> 32 else seed % (1 << 32) for seed in self.seeds]
        low, high = np.array([(word & 0xFFFFFFFF, word >> 32 & 0xFFFFFFFF) for word in words], np.uint32).T
        keys = jax.vmap(jax.random.key)(low)
        if not high.any():
            return keys
        return jnp.where(high, jax.vmap(jax.random.fold_in)(jax.random.clone(keys), high), keys)

    @property
    def guided(self):
        """Whether both sides of guidance are needed: also for prompts that are weighed against the negative one."""
        return self.guidance != 1 or self.grammar == "a1111" and any(map(grammars.weighed, self.prompts))

    def start_noise(self, shape):
        """Returns the noise from which sampling begins, standard normal [B h w c]; shape: (h, w, c).

        Raises ValueError when the job's own noise has another shape.
        """
        if self.noise is not None:
            if self.noise.shape != (len(self.prompts), *shape):
                raise ValueError(f"noise {tuple(self.noise.shape)}: expected {(len(self.prompts), *shape)}")
            return jnp.asarray(self.noise, jnp.float32)
        drawn = foreign_noise.start(self.noise_source, self.seeds, shape)
        start = _normal(self.keys, shape) if drawn is None else jnp.asarray(drawn)
        seed, amount = self.variation
        if not amount:
            return start
        others = [seed + i for i in range(len(self.seeds))]
        other = dataclasses.replace(self, seeds=others, variation=(0, 0.0)).start_noise(shape)
        return slerp.slerp(start, other, amount)


def _check(job, seeds):
    """Raises ValueError for a field of a job that is no number, whole number or name of those that it takes."""
    for name, known in NAMES.items():
        value = getattr(job, name)
        if value not in tuple(known) and not (name == "weighting" and value is None):
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
    for seed in seeds:
        _whole("seed", -ANY, seed)
        if not SEEDS[0] <= operator.index(seed) <= SEEDS[1]:
            raise ValueError(f"seed={seed}: expected {SEEDS[0]} to {SEEDS[1]}")
    for name, low in COUNTS.items():
        _whole(name, low, getattr(job, name))
    for name, (low, high) in RANGES.items():
        if not (name == "eta" and job.eta is None):
            _number(name, getattr(job, name), low, high)
    if not isinstance(job.variation, (tuple, list)) or len(job.variation) != 2:
        raise ValueError(f"variation={job.variation!r}: expected (seed, amount)")
    _whole("variation seed", -ANY, job.variation[0])
    _number("variation", job.variation[1], 0, 1)


def _whole(name, low, *values):
    for value in values:
        if not hasattr(type(value), "__index__") or operator.index(value) < low:
            raise ValueError(f"{name}={value!r}: expected a whole number{'' if low == -ANY else f', {low} or more'}")


def _number(name, value, low, high):
    """Raises ValueError for what is no number from low to high; infinity is one for a highest sigma only."""
    real = isinstance(value, numbers.Real)
    number = float(value) if real and not isinstance(value, int) else value  # LARGEST is no number of a float16
    finite = real and (-LARGEST <= number <= LARGEST or name == "churn_high" and number == ANY)
    if not finite or not low <= number <= high:
        least = "above 0" if low == POSITIVE else f"{low} or more"
        wanted = f"{low} to {high}" if high != ANY else least if low != -ANY else "a finite number"
        wanted += f", at most {LARGEST:.3g}" if real and ANY > abs(number) > LARGEST else ""
        raise ValueError(f"{name}={value}: expected {wanted}")


def text2img(sd, prompts, *, size=None, **settings):
    """Returns pictures uint8 [B H W 3], one per prompt.

    size: pixels, or (height, width); None is the model's.  settings: see Job.
    Raises ValueError for settings that do not fit each other or the model, and for a size that it cannot make.
    """
    job = Job(prompts, **settings)
    return decode(sd, run(sd, job, job.start_noise(latent_shape(sd, size))))


def img2img(sd, prompts, pictures, *, strength=0.75, size=None, resize="crop", **settings):
    """Returns pictures uint8 [B H W 3] that keep as much of the given ones as `strength` leaves.

    pictures: uint8 [H W 3], one for all prompts or one per prompt.
    strength: 0 to 1, the part of the steps that is done, from the picture with as much noise as belongs there.
    size: pixels, or (height, width), to which the pictures are brought by resize.fit; None is the first one's own.
    Any size is made: the picture is continued to what the model can make, and cut off again.
    Source: Meng et al. 2022 (SDEdit); steps are counted as diffusers does.
    """
    job = Job(prompts, **settings)
    skipped = first_step(job.steps, strength)
    pixels = fitted(pictures, len(job.prompts), size, resize)
    z = encode(sd, pad(pixels, sd.factor), job.keys)
    made = decode(sd, run(sd, job, job.start_noise(z.shape[1:]), z=z, skipped=skipped))
    return made[:, : pixels.shape[1], : pixels.shape[2]]


def interpolate(sd, prompts, frames, *, seeds=(0, 0), size=None, at_once=None, **settings):
    """Returns `frames` pictures uint8 [frames H W 3] on the way from one prompt and seed to another.

    prompts: two, or one.  seeds: two, or one.  The start's noise moves on an arc (mixing.slerp), the texts' encodings
    on a line; fresh noise is the first seed's.  at_once: None makes all frames together.  settings: see Job.
    Raises ValueError for fewer than 2 frames, and for different prompts that are read anew at every step, as E4T's
    encoder and grammars do.
    """
    _whole("frames", 2, frames)
    at_once = frames if at_once is None else at_once
    _whole("at_once", 1, at_once)
    (first, last), ends = _ends("prompts", prompts), _ends("seeds", seeds)
    job = Job([first] * frames, seeds=[ends[0]] * frames, **settings)
    if first != last and (sd.conditioners or job.grammar != "plain"):
        raise ValueError("prompts: those that are read anew at every step have no way between them; expected one")
    shape, share, made = latent_shape(sd, size), np.linspace(0, 1, frames, dtype=np.float32), []
    low, high = (Job([first], **{**settings, "seeds": [seed]}).start_noise(shape) for seed in ends)
    texts = [] if first == last else [words(sd, [text], job.skip)["context"] for text in (first, last)]
    for begin in range(0, frames, at_once):
        places = np.minimum(np.arange(begin, begin + at_once), frames - 1)  # one shape: nothing compiles for the rest
        part = share[places][:, None, None]
        cond = {"context": (1 - part) * texts[0] + part * texts[1]} if texts else None
        made.append(decode(sd, run(sd, _part(job, places), slerp.slerp(low, high, part[..., None]), cond=cond)))
    return np.concatenate(made)[:frames]


def _ends(name, given):
    """Returns the two ends of a way that is given by two values, or by one for both."""
    ends = [given] if np.ndim(given) == 0 else list(given)
    if len(ends) not in (1, 2):
        raise ValueError(f"{name}: {len(ends)} given; expected one or two")
    return ends[0], ends[-1]


def first_step(steps, strength):
    """Returns how many steps image-to-image leaves out at the noisy end: steps - int(steps * strength).

    Raises ValueError for a strength out of range, and where no step would be left.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: expected more than 0, to 1")
    kept = min(int(steps * strength), steps)
    if not kept:
        raise ValueError(f"strength={strength}: none of {steps} steps is left; expected at least {1 / steps:.3g}")
    return steps - kept


def latent_shape(sd, size=None):
    """Returns (h, w, c) of the latents of pictures of `size` pixels, (height, width), or the model's size.

    Raises ValueError for a side that is not a positive multiple of what the model halves it to, and for a picture that
    would not fit into memory.
    """
    config = sd.networks["unet"].config
    if size is None:
        sides = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
        return (*sides, sd.networks["vae"].config.latent_channels)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < sd.factor or height % sd.factor or width % sd.factor:
        near = tuple(max(sd.factor, round(side / sd.factor) * sd.factor) for side in (height, width))
        raise ValueError(f"size={size!r}: sides must be positive multiples of {sd.factor}, such as {near}")
    memory.check(sd, (height // sd.factor, width // sd.factor), 1)
    return height // sd.factor, width // sd.factor, sd.networks["vae"].config.latent_channels


# ---- between pixels and latents ------------------------------------------------------------------


def encode(sd, pictures, keys):
    """Returns scaled latents [B h w c], one draw each, of pictures uint8 [B H W 3]; large ones in tiles.

    keys: one per picture [B]; the draw is of its own, apart from the sampling noise of the same key.
    """
    sd, place = replicas.share(sd.bare, len(pictures))
    z = _draw_latents(sd, tiles.moments(sd, place(to_pixels(pictures))), place(keys))
    return finite.made("latents of the given pictures", z)


def decode(sd, z):
    """Returns pictures uint8 [B H W 3] of scaled latents [B h w c]; large ones in tiles, to save memory."""
    sd, place = replicas.share(sd.bare, len(z))
    with memory.told(tuple(side * sd.factor for side in z.shape[1:3]), len(z)):
        return to_pictures(finite.made("pixels", tiles.decode(sd, place(z))))


# ---- sampling ------------------------------------------------------------------------------------


def run(sd, job, start, *, z=None, skipped=0, cond=None, extra=None, region=None, before=None):
    """Returns the scaled latents [B h w c] that a job leads to.

    start: standard normal noise [B h w c].  z: the latents that image-to-image begins with, `skipped` steps late.
    cond: what to add to the prompts' own, for both sides of guidance.  extra: channels for a network that reads more
    than the latent [B h w E].  region: a KnownRegion of B pictures.  before: steps of a first pass that this follows.
    Prompts of several sizes (prompt.sizes) are made one size after the other, each filled up to B, so that none is
    padded for another and one program of each size serves all batches.
    Raises ValueError for an unknown sampler or schedule, for extra channels that the network does not take, for what
    does not fit into memory, and where a latent is not finite, naming the step.
    """
    rows = {"start": start, "z": z, "cond": cond, "extra": extra, "region": region}
    groups = _groups(sd, job, before)
    if len(groups) == 1:
        return _run(sd, job, **rows, skipped=skipped, before=before)
    made = np.zeros(start.shape, np.float32)
    for group in groups:
        places = np.resize(group, len(start))
        some = jax.tree.map(lambda x: x[places], rows)  # noqa: B023
        made[places] = _run(sd, _part(job, places), **some, skipped=skipped, before=before)
    return jnp.asarray(made)


def _groups(sd, job, before):
    """Returns the places of the prompts that are made together, a list for each size."""
    if job.grammar == "plain" or "text_encoder" not in sd.parts:
        return [range(len(job.prompts))]
    unwanted, groups = job.negative if job.guided else None, {}
    sizes = conditioning.sizes(sd, job.prompts, unwanted, steps=job.steps, grammar=job.grammar, before=before)
    for place, size in enumerate(sizes):
        groups.setdefault(size, []).append(place)
    return list(groups.values())


def _part(job, places):
    """Returns the job of some of a job's pictures, whose noise is given."""
    lists = {name: [getattr(job, name)[i] for i in places] for name in ("prompts", "seeds", "negative")}
    return dataclasses.replace(job, **lists, noise=None, control=[_seen(one, places) for one in job.control])


def _seen(one, places):
    """Returns the Control of some pictures of a batch."""
    many = isinstance(one.picture, (list, tuple)) or np.ndim(one.picture) == 4
    if not many or len(one.picture) == 1:
        return one
    return dataclasses.replace(one, picture=[one.picture[i] for i in places])


def _run(sd, job, start, z, cond, extra, region, *, skipped, before):
    churn = job.churn, job.churn_low, job.churn_high, job.churn_noise
    plan = tabulate(sd.schedule, job.sampler, job.steps, job.schedule, job.eta, skipped, churn)
    sd, place = replicas.share(sd, len(start))
    start = place(start)
    sides, count = start.shape[1:3], len(start) // replicas.count(start)
    parts = conditioning.parts(job.prompts, job.grammar) if job.guided else 0
    memory.check(sd, sides, count * (1 + parts), controls=len(job.control))
    if region is not None:
        sd = sd.add(wrappers=region)
    sd, own, negative = _texts(sd, job, before)
    cond = {**own, **(cond or {})}
    extra = _extra_channels(sd, job, start, extra)
    if extra is not None:
        sd, cond["extra"] = sd.add(wrappers=ExtraChannels()), extra
    size = tuple(side * sd.factor for side in sides)
    sd, cond, negative = control.attach(sd, job.control, cond, negative, int(plan.steps), size)
    if negative is not None:
        times = guided_times(plan, job.guidance_start, job.guidance_end)
        sd = sd.add(wrappers=Guidance(np.float32(job.guidance), place(negative), np.float32(job.rescale), *times))
    if job.threshold:
        sd = sd.add(wrappers=Threshold(np.float32(job.threshold), np.float32(job.threshold_limit)))
    fresh = None
    if plan.stochastic:
        fresh = foreign_noise.steps(job.noise_source, job.seeds, start.shape[1:], plan.draws, job.ensd)
    cond, keys, z = place((cond, job.keys, z))
    with memory.told(size, count), _bar(int(plan.rows), job.progress) as tick:
        made, lost = jax.block_until_ready(_sample(sd.bare, cond, start, keys, plan, z, fresh, tick=tick))
    dtype = jnp.dtype(sd.networks["unet"].dtype).name
    advice = f"finite weights, and guidance={job.guidance:g} and dtype={dtype} that suit them"
    return finite.latents(made, lost, int(plan.steps), advice)


def _texts(sd, job, before):
    """Returns (sd, cond, negative), negative None without guidance."""
    if "text_encoder" not in sd.parts:  # LDM-SR reads no words
        return sd, {}, None
    sd = sd.replace(conditioners=tuple(c.replace(skip=job.skip) if hasattr(c, "skip") else c for c in sd.conditioners))
    if job.grammar != "plain":
        options = dict(steps=job.steps, skip=job.skip, grammar=job.grammar, weighting=job.weighting, before=before)
        return conditioning.condition(sd, job.prompts, job.negative if job.guided else None, **options)
    cond, negative = words(sd, job.prompts, job.skip), words(sd, job.negative, job.skip) if job.guided else None
    learned = [c.word for c in sd.conditioners if hasattr(c, "word")]
    if negative is not None and any(np.isin(negative["ids"], word).any() for word in learned):
        cond = {**cond, "negative": negative}  # what a conditioner makes anew in every step
    return sd, cond, negative


def words(sd, prompts, skip=0):
    """Returns the cond of a list of prompts."""
    return _condition(sd.bare, sd.tokenize(prompts), skip)


def _extra_channels(sd, job, start, extra):
    """Returns the extra channels that the UNet takes beside the latent; an inpainting model without any sees a hole."""
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


def _split(keys):
    """Returns the keys [B] of the start, of the noise between the steps and of the given picture's latent."""
    return jax.vmap(lambda key: tuple(jax.random.split(key, 3)))(keys)


@functools.partial(jax.jit, static_argnames="shape")
def _normal(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(_split(keys)[0])


@functools.partial(jax.jit, static_argnames="shape")
def picture_noise(keys, shape):
    """Returns standard normal noise [B *shape] for the given picture, apart from the noise of sampling."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(_split(keys)[2])


@jax.jit
def _draw_latents(sd, moments, keys):
    return sd.latents(moments, _split(keys)[2])


@functools.partial(jax.jit, static_argnames="skip")
def _condition(sd, ids, skip):
    return sd.condition(ids, skip)


@functools.partial(jax.jit, static_argnames="tick")
def _sample(sd, cond, start, keys, plan, z, fresh, *, tick):
    def denoise(z, t, i):
        if tick is not None:
            jax.debug.callback(tick)
        return sd.denoise(z, t, cond, i)[0]

    return sample(denoise, start, plan, _split(keys)[1], z=z, step_noise=fresh)


class _bar:
    """A progress bar as a context; yields what each evaluation of the network calls, None without a bar."""

    current = None

    def __init__(self, total, wanted):
        self.total, self.wanted = total, wanted

    def __enter__(self):
        if not self.wanted:
            return None
        _bar.current = tqdm(total=self.total, desc="sampling", unit="step", dynamic_ncols=True)
        return _tick

    def __exit__(self, *_):
        if self.wanted:
            _bar.current.close()
            _bar.current = None


def _tick():
    if _bar.current is not None:
        _bar.current.update()
