"""A batch of pictures, and the random numbers of each.

one = job(settings.TextToImage, ["a photo of a face"], seeds=[0], steps=20, guidance=7.5)
start = one.start_noise((64, 64, 4))
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from sdjax import trees
from sdjax.sampling import control, foreign_noise, settings, slerp
from sdjax.sampling.fields import fields, understood
from sdjax.settings import SettingError

Pictures = UInt8[np.ndarray, "B H W 3"]


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of sampling: `done` of `steps` steps; preview() decodes the current latents [B h w c]."""

    done: int
    steps: int
    preview: Callable[[], Pictures]
    latents: Any


class Cancelled(Exception):
    """Sampling stopped because `watch` returned true."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A batch of pictures and how to compute it.

    pictures: the settings of each picture, of one class in settings.TASKS; only prompt, seed and files may differ.
    noise: standard normal [B h w c] instead of the seeds' noise.  control: ControlNets with pictures (control.py).
    progress: show a progress bar.  watch(Progress) runs after every step; if it returns true, Cancelled is raised at
    most two steps later.  Neither changes the pictures.
    Raises ValueError for no pictures, and SettingError for settings that must not differ.
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
        """The settings of the first picture, for settings that all pictures share."""
        return self.pictures[0]

    def each(self, name: str) -> list[Any]:
        """Returns a setting of every picture [B]."""
        return [getattr(one, name) for one in self.pictures]

    @property
    def keys(self) -> Array:
        """One key per picture [B]: from the seed's low 32 bits; high bits that are not 0 are folded in."""
        return trees.seed_keys(self.each("seed"))

    def start_noise(self, shape: tuple[int, int, int]) -> Float[Array, "B h w c"]:
        """Returns the standard normal start noise; shape: (h, w, c).

        Raises ValueError if the job's own noise has another shape.
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

    def seeded_noise(self, shape: Any) -> Float[Array, "B h w c"]:
        """Returns the start noise without variations; shape: (h, w, c)."""
        pictures = tuple(dataclasses.replace(one, variation=0.0) for one in self.pictures)
        return dataclasses.replace(self, pictures=pictures).start_noise(shape)

    def step_noise(self, shape: Any, draws: Any) -> Any:
        """Returns the fresh noise of a plan's steps, see foreign_noise.steps; None if it is drawn from keys."""
        shared = self.settings
        return foreign_noise.steps(shared.noise_source, self.each("seed"), shape, draws, shared.ensd)


def job(task: type, prompts: str | Sequence[str], *, seeds: Any = None, **given: Any) -> Job:
    """Returns the Job of prompts, with settings of a task.

    seeds: one per prompt; None counts from 0.  Settings that may differ between pictures (negative_prompt, variation
    ...) are one value for all, or a list with one per prompt; a single variation_seed counts up.
    noise, control, progress, watch: see Job.
    Raises ValueError for lists of another length, SettingError for an unknown setting or a value that is not accepted.
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


def split_keys(keys: Key[Array, " B"]) -> tuple[Array, Array, Array]:
    """Returns the keys [B] for the start noise, for the fresh noise of steps and for the given picture's latent."""
    return jax.vmap(lambda key: tuple(jax.random.split(key, 3)))(keys)


@functools.partial(jax.jit, static_argnames="shape")
def _normal(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(split_keys(keys)[0])


@functools.partial(jax.jit, static_argnames="shape")
def picture_noise(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Returns standard normal noise [B *shape] for the given picture, independent of the noise of sampling."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(split_keys(keys)[2])
