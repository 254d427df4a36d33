"""The loss on held-out pictures, at fixed noise and times.

    validation = Validation(settings, task, frozen, held_out, out / "validation.json", start)
    value = validation(step, weights)           # float; smaller is better
    validation.best, validation.waited          # (step, value), and how many values since

validation.json holds {step: value}; a run that resumes at a step drops later values.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax import trees
from sdjax.data.batches import Batches
from sdjax.formats.storage import files
from sdjax.runtime import processes
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task
from sdjax.training.step import default_loss

FILE = "validation.json"
DRAWS, ROWS = 2, 16  # least number of noises and times per picture, and in total


class Validation:
    """The history of a run's validation loss; `values`: [(step, value)] in order."""

    def __init__(
        self, settings: Any, task: Task, frozen: StableDiffusion, data: Batches, place: Path, start: int = 0
    ) -> None:
        self.frozen, self.data, self.place = frozen, data, place
        self.values = [pair for pair in history(place) if pair[0] <= start]
        draws = max(DRAWS, math.ceil(ROWS / len(data.source)))
        self.batches = math.ceil(draws * len(data.source) / data.data.batch)
        key = trees.named_key(trees.seed_key(settings.seed), "validation")
        method = settings.method
        loss = method.loss or default_loss(method, settings, task, random=False)

        def measured(frozen, trained, batch):
            value, metrics = loss(frozen, trained, batch, jax.random.clone(key), 0)
            return metrics.get("error", value)

        self.measured = jax.jit(measured)

    def __call__(self, step: int, trained: Any) -> float:
        """Measures, stores and returns the mean error of the held-out pictures after a step.

        It excludes the loss's weights and penalties, so that runs with other settings are comparable; a method's own
        loss is complete.
        """
        value = processes.led(lambda: self._mean(trained))
        self.values = [pair for pair in self.values if pair[0] != step] + [(step, value)]
        if processes.first():
            with files.new_file(self.place) as temporary:
                files.write_json(temporary, {str(step): value for step, value in self.values})
        return value

    def _mean(self, trained):
        stream = zip(range(self.batches), self.data.iterate(), strict=False)
        return float(np.mean([self.measured(self.frozen, trained, batch) for _, batch in stream]))

    @property
    def best(self) -> tuple[int, float] | None:
        """The (step, value) of the smallest value, the first of equal ones."""
        return best(self.values)

    @property
    def waited(self) -> int:
        """The number of values after the best one."""
        return waited(self.values)


def history(place: Path) -> list[tuple[int, float]]:
    """Returns the [(step, value)] of a run's validation.json, [] without the file."""
    found = files.read_json(place) if place.is_file() else {}
    return sorted((int(step), float(value)) for step, value in found.items())


def best(values: list[tuple[int, float]]) -> tuple[int, float] | None:
    """Returns the first pair with the smallest value; None for no pairs."""
    return min(values, key=lambda pair: pair[1], default=None)


def waited(values: list[tuple[int, float]]) -> int:
    """Returns the number of pairs after the best one, 0 for no pairs."""
    found = best(values)
    return len(values) - 1 - values.index(found) if found else 0
