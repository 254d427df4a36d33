"""Words in, pictures out.

    images = text2img(sd, ["a photo of a face"], seeds=[0], steps=20, guidance=7.5)     # uint8 [B H W 3]
    images = img2img(sd, ["a sketch of a face"], images, strength=0.6)

Settings are those of settings.TextToImage and its kin.  Every task is a Job, pictures that are made together, and one
call of `run`.  Image i depends on its own prompt, picture and seed, never on the batch that it is made in.  Another
prompt, seed, guidance, strength, number of steps or sampler of the same kind of noise compiles nothing.

Shapes: B batch, H W pixels, h w latent pixels, c latent channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8
from tqdm import tqdm

from sdjax.diffusion.samplers.plan import begin, guided_times, sample, tabulate, walk
from sdjax.diffusion.wrappers import Guidance, KnownRegion, Threshold, mask_channels
from sdjax.images.resize import fitted, pad
from sdjax.models.cond import Cond, UNetInputs
from sdjax.runtime import replicas
from sdjax.sampling import control, finite, foreign_noise, memory, settings, slerp, tiles
from sdjax.sampling.fields import Size, fields, make, understood
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion, to_pictures, to_pixels
from sdjax.text import conditioning, grammars

Pictures = UInt8[np.ndarray, "B H W 3"]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far sampling is: `done` of `steps` steps; preview() decodes what is there, latents [B h w c], to pictures."""

    done: int
    steps: int
    preview: Callable[[], Pictures]
    latents: Any


class Cancelled(Exception):
    """What `watch` asked for."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Pictures that are made together, and how.

    pictures: the settings of each, one of settings.TASKS; all but those that a picture may have for itself are alike.
    noise: standard normal [B h w c] in place of the seeds'.  control: ControlNets with their pictures (control.py).
    progress: a bar over the steps.  watch(Progress) is called after every step; where it returns true, Cancelled is
    raised, at most two steps later.  Pictures are the same with both.
    Raises ValueError for no pictures, and SettingError for a setting in which they differ.
    """

    pictures: tuple[settings.Task, ...]
    noise: Any = None
    control: Any = ()
    progress: bool = False
    watch: Callable[[Progress], Any] | None = None

    def __post_init__(self) -> None:
        first, *others = self.pictures
        for name, field in fields(type(first)).items():
            if not field.about.own and any(getattr(one, name) != getattr(first, name) for one in others):
                raise SettingError(
                    name, [getattr(one, name) for one in self.pictures], "one for all pictures of a call"
                )
        controls = (self.control,) if isinstance(self.control, control.Control) else tuple(self.control)
        object.__setattr__(self, "control", controls)

    @property
    def settings(self) -> Any:
        """What all pictures have in common, as the settings of the first."""
        return self.pictures[0]

    def each(self, name: str) -> list[Any]:
        """Returns a setting of every picture [B]."""
        return [getattr(one, name) for one in self.pictures]

    @property
    def keys(self) -> Array:
        """One key per picture [B]: of the seed's low 32 bits, with the high ones folded in where they are not 0."""
        words = [seed if abs(seed) >> 32 else seed % (1 << 32) for seed in self.each("seed")]
        low, high = np.array([(word & 0xFFFFFFFF, word >> 32 & 0xFFFFFFFF) for word in words], np.uint32).T
        keys = jax.vmap(jax.random.key)(low)
        if not high.any():
            return keys
        return jnp.where(high, jax.vmap(jax.random.fold_in)(jax.random.clone(keys), high), keys)

    @property
    def guided(self) -> bool:
        """Whether both sides of guidance are needed: also for prompts that are weighed against the negative one."""
        shared = self.settings
        return shared.guidance != 1 or shared.grammar == "a1111" and any(map(grammars.weighed, self.each("prompt")))

    def start_noise(self, shape: tuple[int, int, int]) -> Float[Array, "B h w c"]:
        """Returns the noise from which sampling begins, standard normal; shape: (h, w, c).

        Raises ValueError when the job's own noise has another shape.
        """
        count = len(self.pictures)
        if self.noise is not None:
            if self.noise.shape != (count, *shape):
                raise ValueError(f"noise {tuple(self.noise.shape)}: expected {(count, *shape)}")
            return jnp.asarray(self.noise, jnp.float32)
        drawn = foreign_noise.start(self.settings.noise_source, self.each("seed"), shape)
        start, amounts = _normal(self.keys, shape) if drawn is None else jnp.asarray(drawn), self.each("variation")
        if not any(amounts):
            return start
        others = [dataclasses.replace(one, seed=one.variation_seed, variation=0.0) for one in self.pictures]
        other = Job(tuple(others)).start_noise(shape)
        if len(set(amounts)) == 1:
            return slerp.slerp(start, other, amounts[0])
        mixed = [
            slerp.slerp(start[i : i + 1], other[i : i + 1], v) if v else start[i : i + 1] for i, v in enumerate(amounts)
        ]
        return jnp.concatenate(mixed)


def job(task: type, prompts: str | Sequence[str], *, seeds: Any = None, **given: Any) -> Job:
    """Returns the Job of prompts, with settings of a task; seeds count from 0 where None.

    What a picture may have for itself (seeds, negative_prompt, variation ...) is one for all or a list, one per prompt;
    one variation_seed counts on.  noise, control, progress, watch: of Job.
    Raises ValueError for lists of another length, and SettingError for an unknown setting and a value that is not
    accepted.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    count = len(prompts)
    own = {name for name, field in fields(task).items() if field.about.own}
    more = {name: given.pop(name) for name in ("noise", "control", "progress", "watch") if name in given}
    seeds = range(count) if seeds is None else [seeds] if np.ndim(seeds) == 0 else seeds
    given = {"seed": seeds} | understood(task, given)
    if not isinstance(given.get("variation_seed", ()), (list, tuple)):
        given["variation_seed"] = [given["variation_seed"] + i for i in range(count)]
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    for name, value in given.items():
        many = name in own and not isinstance(value, str) and np.ndim(value) == 1
        values = list(value) if many else [value] * count
        if len(values) != count or not count:
            said = f"{len(values)} {name}" + ("s" if name == "seed" else "")
            raise ValueError(f"{count} prompts, {said}: expected as many")
        for row, one in zip(rows, values, strict=True):
            row[name] = one
    return Job(tuple(task(**row) for row in rows), **more)


def text2img(sd: StableDiffusion, prompts: str | Sequence[str], **given: Any) -> Pictures:
    """Returns pictures uint8 [B H W 3], one per prompt.

    given: settings of settings.TextToImage and, as `seeds`, what `job` takes; `hires` is a function of its own.
    Raises SettingError for settings that do not fit each other or the model, and for a size that it cannot make.
    """
    return drawn(sd, job(settings.TextToImage, prompts, **given))


def img2img(sd: StableDiffusion, prompts: str | Sequence[str], pictures: Any, **given: Any) -> Pictures:
    """Returns pictures uint8 [B H W 3] that keep as much of the given ones as `strength` leaves.

    pictures: uint8 [H W 3], one for all prompts or one per prompt.
    given: settings of settings.ImageToImage, and what `job` takes.  strength: the part of the steps that is done, from
    the picture with as much noise as belongs there.  size: to which the pictures are brought by resize.fit; None is the
    first one's own.  Any size is made: the picture is continued to what the model can make, and cut off again.
    Source: Meng et al. 2022 (SDEdit); steps are counted as diffusers does.
    """
    return redrawn(sd, job(settings.ImageToImage, prompts, **given), pictures)


def drawn(sd: StableDiffusion, job: Job) -> Pictures:
    """Returns the pictures [B H W 3] of a job from words alone."""
    return decode(sd, run(sd, job, job.start_noise(latent_shape(sd, job.settings.size))))


def redrawn(sd: StableDiffusion, job: Job, pictures: Any) -> Pictures:
    """Returns the pictures [B H W 3] of a job that begins with pictures."""
    shared = job.settings
    skipped = first_step(shared.steps, shared.strength)
    pixels = fitted(pictures, len(job.pictures), shared.size, shared.resize)
    z = encode(sd, pad(pixels, sd.factor), job.keys)
    _, h, w, c = z.shape
    made = decode(sd, run(sd, job, job.start_noise((h, w, c)), z=z, skipped=skipped))
    return made[:, : pixels.shape[1], : pixels.shape[2]]


def interpolate(
    sd: StableDiffusion,
    prompts: str | Sequence[str],
    frames: int = 16,
    *,
    seeds: Any = 0,
    batch: int | None = None,
    **given: Any,
) -> Pictures:
    """Returns `frames` pictures uint8 [frames H W 3] on the way from one prompt and seed to another.

    prompts: two, or one.  seeds: two, or one.  The start's noise moves on an arc (slerp.slerp), the texts' encodings
    on a line; fresh noise is the first seed's.  batch: how many are made at once; None is all.
    given: settings of settings.Interpolate.
    Raises SettingError for fewer than 2 frames, and for different prompts that are read anew at every step, as E4T's
    encoder and grammars do.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ends = [seeds] if np.ndim(seeds) == 0 else list(seeds)
    for name, some in (("prompts", texts), ("seeds", ends)):
        if len(some) not in (1, 2):
            raise SettingError(name, some, "one, or two")
    more = {name: given.pop(name) for name in ("progress", "watch") if name in given}
    values = {"prompt": texts[0], "to_prompt": texts[-1], "seed": ends[0], "to_seed": ends[-1], "frames": frames}
    return between(sd, make(settings.Interpolate, values | given), batch, **more)


def between(
    sd: StableDiffusion, way: settings.Interpolate, batch: int | None = None, progress: bool = False, watch: Any = None
) -> Pictures:
    """Returns the frames [frames H W 3] of an interpolation, `batch` at once; None is all."""
    if batch is not None and batch < 1:
        raise SettingError("batch", batch, "a whole number, 1 or more")
    first, last = way.prompt, way.prompt if way.to_prompt is None else way.to_prompt
    if first != last and (sd.conditioners or way.grammar != "plain"):
        raise ValueError("prompts: those that are read anew at every step have no way between them; expected one")
    frames, count = way.frames, min(batch or way.frames, way.frames)
    shape, share, made = latent_shape(sd, way.size), np.linspace(0, 1, frames, dtype=np.float32), []
    seeds = way.seed, way.seed if way.to_seed is None else way.to_seed
    low, high = (Job((dataclasses.replace(way, seed=seed),)).start_noise(shape) for seed in seeds)
    texts = [] if first == last else [words(sd, [text], way.clip_skip).unet.context for text in (first, last)]
    for done in range(0, frames, count):
        places = np.minimum(np.arange(done, done + count), frames - 1)  # one shape: nothing compiles for the rest
        part = share[places][:, None, None]
        cond = Cond(UNetInputs((1 - part) * texts[0] + part * texts[1])) if texts else None
        some = Job((way,) * len(places), progress=progress, watch=watch)
        made.append(decode(sd, run(sd, some, slerp.slerp(low, high, part[..., None]), cond=cond)))
    return np.concatenate(made)[:frames]


def first_step(steps: int, strength: float, name: str = "strength") -> int:
    """Returns how many steps image-to-image leaves out at the noisy end: steps - int(steps * strength).

    Raises SettingError, of the strength's name, where no step would be left.
    """
    kept = min(int(steps * strength), steps)
    if not kept:
        raise SettingError(name, strength, f"at least {1 / steps:.3g}", f"none of {steps} steps is left")
    return steps - kept


def latent_shape(sd: StableDiffusion, size: Any = None) -> tuple[int, int, int]:
    """Returns (h, w, c) of the latents of pictures of `size` pixels, (height, width), or the model's size.

    Raises ValueError for a side that is not a positive multiple of what the model halves it to, and for a picture that
    would not fit into memory.
    """
    config = sd.networks["unet"].config
    if size is None:
        height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        return height, width, sd.networks["vae"].config.latent_channels
    height, width = size = Size.of(size)
    if min(height, width) < sd.factor or height % sd.factor or width % sd.factor:
        near = Size(*(max(sd.factor, round(side / sd.factor) * sd.factor) for side in size))
        raise SettingError("size", size, f"sides that are multiples of {sd.factor}, such as {near}")
    memory.check(sd, (height // sd.factor, width // sd.factor), 1)
    return height // sd.factor, width // sd.factor, sd.networks["vae"].config.latent_channels


# ---- between pixels and latents ------------------------------------------------------------------


def encode(sd: StableDiffusion, pictures: Any, keys: Key[Array, " B"]) -> Float[Array, "B h w c"]:
    """Returns scaled latents [B h w c], one draw each, of pictures uint8 [B H W 3]; large ones in tiles.

    keys: one per picture [B]; the draw is of its own, apart from the sampling noise of the same key.
    """
    sd, place = replicas.share(sd.bare, len(pictures))
    z = _draw_latents(sd, tiles.moments(sd, place(to_pixels(pictures))), place(keys))
    return finite.made("latents of the given pictures", z)


def decode(sd: StableDiffusion, z: Float[Array, "B h w c"]) -> Pictures:
    """Returns pictures uint8 [B H W 3] of scaled latents [B h w c]; large ones in tiles, to save memory."""
    sd, place = replicas.share(sd.bare, len(z))
    with memory.told(tuple(side * sd.factor for side in z.shape[1:3]), len(z)):
        return to_pictures(finite.made("pixels", tiles.decode(sd, place(z))))


# ---- sampling ------------------------------------------------------------------------------------


def run(
    sd: StableDiffusion,
    job: Job,
    start: Float[Array, "B h w c"],
    *,
    z: Float[Array, "B h w c"] | None = None,
    skipped: int = 0,
    cond: Cond | None = None,
    region: KnownRegion | None = None,
    before: int | None = None,
) -> Float[Array, "B h w c"]:
    """Returns the scaled latents [B h w c] that a job leads to.

    start: standard normal noise [B h w c].  z: the latents that image-to-image begins with, `skipped` steps late.
    cond: what goes before the prompts' own Cond, for both sides of guidance.  region: a KnownRegion of B pictures.
    before: steps of a first pass that this follows.
    Prompts of several sizes (conditioning.sizes) are made one size after the other, each filled up to B, so that none
    is padded for another and one program of each size serves all batches.
    Raises ValueError for an unknown sampler or schedule, for extra channels that the network does not take, for what
    does not fit into memory, and where a latent is not finite, naming the step.
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


def _groups(sd, job, before):
    """Returns the places of the prompts that are made together, a list for each size."""
    shared = job.settings
    if shared.grammar == "plain" or "text_encoder" not in sd.parts:
        return [range(len(job.pictures))]
    unwanted, groups = job.each("negative_prompt") if job.guided else None, {}
    how = dict(steps=shared.steps, grammar=shared.grammar, before=before)
    sizes = conditioning.sizes(sd, job.each("prompt"), unwanted, **how)
    for place, size in enumerate(sizes):
        groups.setdefault(size, []).append(place)
    return list(groups.values())


def _part(job, places):
    """Returns the job of some of a job's pictures, whose noise is given."""
    pictures = tuple(job.pictures[i] for i in places)
    return dataclasses.replace(job, pictures=pictures, noise=None, control=[_seen(one, places) for one in job.control])


def _seen(one, places):
    """Returns the Control of some pictures of a batch."""
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
    parts = conditioning.parts(job.each("prompt"), shared.grammar) if job.guided else 0
    memory.check(sd, sides, count * (1 + parts), controls=len(job.control))
    if region is not None:
        sd = sd.add(wrappers=region)
    sd, own, negative = _texts(sd, job, before)
    cond = own if cond is None else cond.over(own).replace(also=own.also, share=own.share, negative=own.negative)
    cond = cond.with_unet(channels=_extra_channels(sd, job, start, cond.unet.channels))
    size = tuple(side * sd.factor for side in sides)
    sd, cond, negative = control.attach(sd, job.control, cond, negative, int(plan.steps), size)
    if negative is not None:
        times = guided_times(plan, shared.guidance_start, shared.guidance_end)
        sd = sd.add(wrappers=Guidance(np.float32(shared.guidance), place(negative), np.float32(shared.rescale), *times))
    if shared.threshold:
        sd = sd.add(wrappers=Threshold(np.float32(shared.threshold), np.float32(shared.threshold_limit)))
    fresh = None
    if plan.stochastic:
        fresh = foreign_noise.steps(shared.noise_source, job.each("seed"), start.shape[1:], plan.draws, shared.ensd)
    cond, keys, z = place((cond, job.keys, z))
    with memory.told(size, count):
        if not job.progress and job.watch is None:
            made, lost = jax.block_until_ready(_sample(sd.bare, cond, start, keys, plan, z, fresh))
        else:
            with tqdm(
                total=int(plan.rows), desc="sampling", unit="step", dynamic_ncols=True, disable=not job.progress
            ) as bar:
                made, lost = _watched(sd.bare, cond, start, keys, plan, z, fresh, bar, job.watch)
    dtype = jnp.dtype(sd.networks["unet"].dtype).name
    advice = f"finite weights, and guidance={shared.guidance:g} and dtype={dtype} that suit them"
    return finite.latents(made, lost, int(plan.steps), advice)


def _watched(sd, cond, start, keys, plan, z, fresh, bar, watch):
    """Returns (latents, lost) of a plan that is run from the host, step by step; the next step is under way while the
    one before is looked at."""
    steps, state, before = int(plan.steps), _begin(start, jax.random.clone(keys), plan, z, fresh), None
    ends = [0, *np.searchsorted(plan.step[: plan.rows], np.arange(1, steps)), int(plan.rows)]
    for done, (first, last) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        own = jax.random.clone(keys)  # each call draws others of the same keys
        state = _advance(sd, cond, state, own, plan, fresh, np.int32(first), np.int32(last))
        _look(sd, before, done, steps, watch)
        bar.update(int(last - first))
        before = jax.block_until_ready(state) if done + 1 == steps else state
    _look(sd, before, steps, steps, watch)
    return state[0], state[3]


def _look(sd, state, done, steps, watch):
    """Waits for a state and shows it; raises Cancelled where the watcher asks for it."""
    if state is None:
        return
    jax.block_until_ready(state)
    if watch is not None and watch(Progress(done, steps, lambda: decode(sd, state[2][0]), state[2][0])):
        raise Cancelled(f"cancelled after {done} of {steps} steps")


def _texts(sd, job, before):
    """Returns (sd, cond, negative), negative None without guidance."""
    if "text_encoder" not in sd.parts:  # LDM-SR reads no words
        return sd, Cond(), None
    shared, prompts, negative = job.settings, job.each("prompt"), job.each("negative_prompt")
    layers = sd.networks["text_encoder"].config.num_hidden_layers
    if shared.clip_skip > layers:
        raise SettingError("clip_skip", shared.clip_skip, f"1 to {layers}, the layers of the text encoder")
    skip = shared.clip_skip - 1
    sd = sd.replace(conditioners=tuple(c.replace(skip=skip) if hasattr(c, "skip") else c for c in sd.conditioners))
    if shared.grammar != "plain":
        how = dict(steps=shared.steps, skip=skip, grammar=shared.grammar, weighting=shared.weighting, before=before)
        return conditioning.condition(sd, prompts, negative if job.guided else None, **how)
    cond = words(sd, prompts, shared.clip_skip)
    unwanted = words(sd, negative, shared.clip_skip) if job.guided else None
    learned = [c.word for c in sd.conditioners if hasattr(c, "word")]
    ids = () if unwanted is None else unwanted.words[conditioning.ENCODER]["ids"]
    if any(np.isin(ids, word).any() for word in learned):
        cond = cond.replace(negative=unwanted)  # what a conditioner makes anew in every step
    return sd, cond, unwanted


def words(sd: StableDiffusion, prompts: Sequence[str], clip_skip: int = 1) -> Cond:
    """Returns the cond of a list of prompts."""
    return _condition(sd.bare, sd.tokenize(prompts), clip_skip - 1)


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
def picture_noise(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Returns standard normal noise [B *shape] for the given picture, apart from the noise of sampling."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(_split(keys)[2])


@jax.jit
def _draw_latents(sd, moments, keys):
    return sd.latents(moments, _split(keys)[2])


@functools.partial(jax.jit, static_argnames="skip")
def _condition(sd, ids, skip):
    return sd.condition(ids, skip)


@jax.jit
def _sample(sd, cond, start, keys, plan, z, fresh):
    return sample(_denoiser(sd, cond), start, plan, _split(keys)[1], z=z, step_noise=fresh)


@jax.jit
def _begin(start, keys, plan, z, fresh):
    return begin(start, plan, _split(keys)[1], z=z, step_noise=fresh)


@jax.jit
def _advance(sd, cond, state, keys, plan, fresh, first, last):
    return walk(_denoiser(sd, cond), state, plan, first, last, _split(keys)[1], step_noise=fresh)


def _denoiser(sd, cond):
    return lambda z, t, i: sd.denoise(z, t, cond, i)[0]
