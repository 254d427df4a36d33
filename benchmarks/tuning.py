"""Personalises a model in one way, on one subject after another, with one compiled step.

tuner = Tuner(ways.of("pocket", "face")["LoRA, 5"].settings, "pocket")
sd, found = tuner("photos/cat")
for steps, sd, found in tuner.stages("photos/cat", marks=(10, 20)): ...
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from sdjax import trees
from sdjax.stable_diffusion import StableDiffusion
from sdjax.training import run_folder
from sdjax.training.begin import begin, task_of
from sdjax.training.optim import optimizer
from sdjax.training.settings import Train
from sdjax.training.step import initial_state, of_run


class Tuner:
    """A way to personalise a model: `told(model, path)` returns the settings of a run on the pictures in `path`."""

    def __init__(self, told: Callable[[str, str], Train], model: str) -> None:
        self.told, self.model, self.step = told, model, None

    def __call__(self, path: str | Path) -> tuple[StableDiffusion, dict[str, Any]]:
        """Returns (sd, found) after the last step; see stages."""
        *_, (_, sd, found) = self.stages(path)
        return sd, found

    def stages(
        self, path: str | Path, marks: Iterable[int] = ()
    ) -> Iterator[tuple[int, StableDiffusion, dict[str, Any]]]:
        """Yields (steps, sd, found) after each number of steps in `marks`, and after the last step.

        found: "steps"; "seconds" and "processor", wall and processor seconds of preparation and steps so far; "memory",
        bytes of a step as the compiler reports them; "bytes", the size of the subject's export.
        The first subject also has "compilation", in seconds.
        """
        clock = Clock()
        settings = self.told(self.model, str(path))
        trained, frozen, data, _ = begin(settings)
        tx, evaluate = optimizer(settings.optim, settings.steps)
        state, stream, found = initial_state(trained, tx, settings.ema), data.iterate(), {}
        first = next(stream)
        clock.stop()
        if self.step is None:
            begun = time.monotonic()
            step = of_run(settings, tx, evaluate, task_of(settings, frozen))
            self.step = jax.jit(step, donate_argnums=0).lower(state, frozen, first).compile()
            found["compilation"] = time.monotonic() - begun
        found["memory"] = memory(self.step)
        ends, batch = {*marks, settings.steps}, first
        for done in range(settings.steps + 1):
            if done in ends:
                jax.block_until_ready(state)
                clock.stop()
                told = {**found, "steps": done, "seconds": clock.wall, "processor": clock.processor}
                sd, told["bytes"] = self._finished(settings, state, frozen, data, evaluate)
                yield done, sd, told
            if done == settings.steps:
                break
            clock.go()
            state, _ = self.step(state, frozen, batch)
            batch = next(stream) if done + 1 < settings.steps else batch

    def _finished(self, settings, state, frozen, data, evaluate):
        """Returns (the model with the trained weights, bytes of its export)."""
        method = settings.method
        learned = trees.copy(state["ema"] if settings.ema else evaluate(state["opt"], state["trained"]))
        if method.finish is not None:
            frozen, learned = method.finish(frozen, learned, data)
        return method.join(frozen, learned).fold(), kept(method, frozen, learned)


class Clock:
    """A clock of wall and processor seconds between go and stop; it starts running."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0
        self.since = None
        self.go()

    def go(self) -> None:
        """Resumes the clock if it is stopped."""
        self.since = self.since or (time.monotonic(), time.process_time())

    def stop(self) -> None:
        """Stops the clock."""
        if self.since:
            self.wall += time.monotonic() - self.since[0]
            self.processor += time.process_time() - self.since[1]
        self.since = None


def memory(step: Any) -> int:
    """Returns the bytes that a compiled step needs at its peak, as the compiler reports them."""
    about = step.memory_analysis()
    parts = sum(getattr(about, f"{kind}_size_in_bytes") for kind in ("argument", "temp", "output"))
    return parts - about.alias_size_in_bytes


def kept(method: Any, frozen: StableDiffusion, learned: Any) -> int:
    """Returns the bytes of a subject's export."""
    with tempfile.TemporaryDirectory() as folder:
        run_folder.export(method, frozen, learned, Path(folder) / "export")
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
