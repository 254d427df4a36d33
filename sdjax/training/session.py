"""The actions of a run between its steps: checkpoints, exports, previews, validation."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.data import batches
from sdjax.data.batches import Batches
from sdjax.runtime import processes
from sdjax.runtime.mesh import Place
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task
from sdjax.training import facts, preview, run_folder
from sdjax.training.asked import SAMPLE
from sdjax.training.begin import shown
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.log import Log
from sdjax.training.optim import Evaluate, as_trained
from sdjax.training.settings import Train
from sdjax.training.unrounded import unrounded
from sdjax.training.validation import FILE, Validation

EXPORT = "export"
SMALL = 1 << 28  # most bytes of trained weights for a trial export


@dataclass
class Session:
    """A run in its folder, starting at a step; `state` is the placed training state.

    All processes of a run make the same calls; only process 0 writes files other than checkpoints.
    """

    settings: Train
    out: Path
    start: int
    frozen: StableDiffusion
    data: Batches
    task: Task
    place: Place
    evaluate: Evaluate
    checkpoints: Checkpoints
    base: str
    told: Log
    validation: Validation | None = field(init=False, default=None)

    def __post_init__(self):
        place = self.out / "samples" / "data.png"
        if processes.first() and not place.exists():
            sheet = preview.data_sheet(self.data)
            preview.save(place, sheet)
            self.told.picture(self.start, "data", sheet)
        held_out = batches.held_out(shown(self.settings, self.task), self.frozen, self.settings.seed)
        if held_out is not None:
            place = self.out / FILE
            self.validation = Validation(self.settings, self.task, self.frozen, held_out, place, self.start)
            self._keep_best()

    @property
    def over(self) -> bool:
        """Whether `patience` measurements passed without a new smallest validation error."""
        waits = self.settings.patience
        return bool(waits) and self.validation is not None and self.validation.waited >= waits

    def learned(self, state: dict[str, Any]) -> Any:
        """Returns the weights to preview and export: the moving average, or else the optimizer's `evaluate`."""
        if self.settings.ema:
            return self.place.whole(state["ema"])
        opt = None if self.evaluate is as_trained else self.place.whole(state["opt"])  # larger than the trained weights
        return self.evaluate(opt, self.place.whole(state["trained"]))

    def rehearse(self, state: dict[str, Any]) -> None:
        """Writes an export and removes it, so that a run does not fail at its end; only of up to SMALL bytes."""
        weights = self.learned(state)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights) if hasattr(leaf, "nbytes"))
        if self.settings.method.formats and size <= SMALL:
            processes.together(lambda: self._rehearsed(weights) if processes.first() else None)

    def _rehearsed(self, weights):
        method, about = self.settings.method, facts.told(self.settings, self.out, 0)
        with tempfile.TemporaryDirectory(prefix="trial-", dir=self.out) as folder:
            run_folder.export(method, self.frozen, weights, Path(folder) / EXPORT, **about)

    def save(self, state: dict[str, Any], wait: bool = False) -> None:
        """Writes a checkpoint."""
        self.checkpoints.save(self.place.gather(state), self.base, wait=wait)

    def after(self, step: int, state: dict[str, Any], wanted: set[str]) -> None:
        """Runs the wanted actions after a step: SAMPLE, EXPORT."""
        for name, act in ((SAMPLE, self._show), (EXPORT, self._export)):
            if name in wanted:
                act(step, state)
                processes.wait()

    def _show(self, step, state):
        """Writes previews."""
        weights = self.learned(state)
        if not processes.first():
            return
        folder, settings = self.out / "samples", self.settings
        seen = settings.method.join(self.frozen, weights).fold(), self.data, settings
        if settings.prompts or not settings.prompts_file:
            picture = preview.write(folder / f"{step:07d}.png", settings.method, *seen)
            if picture is not None:
                self.told.picture(step, "samples", picture)
        if settings.prompts_file:
            for name, picture in preview.lines(folder, step, *seen).items():
                self.told.picture(step, f"samples/{name}", picture)

    def _export(self, step, state):
        """Writes the current export to exports/STEP."""
        weights = self.learned(state)
        if not processes.first():
            return
        frozen, weights = self._finished(weights)
        self._write(frozen, weights, step, self.out / "exports" / f"{step:07d}")

    def measure(self, step: int, state: dict[str, Any]) -> None:
        """Measures the validation error; with `best` it keeps the state of the smallest one."""
        assert self.validation is not None
        self.told.metrics(step, {"validation": self.validation(step, self.learned(state))})
        best = self.validation.best
        if self.settings.best and best is not None and best[0] == step:
            self._keep_best()
            self.save(state)
        processes.wait()

    def end(self, state: dict[str, Any]) -> StableDiffusion:
        """Writes the export, prints how to use it, and returns the joined model; with `best`, from the best step."""
        state = self._best(state)
        frozen, weights = self._finished(self.learned(state))
        if processes.first():
            result, use = self._write(frozen, weights, self._step(state), self.out / "export")
            print("\n  ".join([f"result: {result}", *use]))
        return self.settings.method.join(frozen, weights).fold()

    def _write(self, frozen, weights, step, place):
        """Writes an export; returns (path, lines that explain its use)."""
        settings, about = self.settings, facts.told(self.settings, self.out, step, frozen, weights)
        whole = unrounded(frozen, settings)
        return run_folder.export(settings.method, whole, weights, place, model=settings.model, **about)

    def _finished(self, weights):
        """Returns (frozen, weights) after the method's `finish`, which sees whole batches."""
        finish = self.settings.method.finish
        return (self.frozen, weights) if finish is None else finish(self.frozen, weights, self.data)

    def _keep_best(self):
        """Marks the checkpoint of the best step as kept."""
        best = self.validation.best if self.settings.best and self.validation is not None else None
        if best is not None:
            self.checkpoints.kept.clear()
            self.checkpoints.kept.add(best[0])

    def _best(self, state):
        """Returns the state of the best step, or the given state if it is the best or nothing was measured."""
        best = self.validation.best if self.settings.best and self.validation is not None else None
        if best is None or best[0] == self._step(state):
            return state
        self.checkpoints.wait()
        found = self.checkpoints.restore(self.place.gather(state), self.base, [best[0]])
        if found is None:
            raise ValueError(f"{self.out}: checkpoint {best[0]}, the best, cannot be read; best=False exports the last")
        processes.say(f"best: step {best[0]}, validation {best[1]:.6g}")
        return self.place.state(jax.tree.map(jnp.asarray, found))

    def _step(self, state):
        return int(self.place.gather(state["step"]))
