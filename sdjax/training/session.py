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
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task
from sdjax.training import facts, judged, preview, run_folder
from sdjax.training.asked import SAMPLE
from sdjax.training.begin import shown
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.judged import Judged
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
    judged: Judged | None = field(init=False, default=None)

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
        if self.settings.judge:
            if not self.task.words:
                raise SettingError("judge", self.settings.judge, "'': the task has no previews of prompts alone")
            self.judged = Judged(self.settings, self.data, self.out / judged.FILE, self.start)
        self._keep_best()

    @property
    def ranking(self) -> Validation | Judged | None:
        """The measurements that `best` and `patience` follow."""
        return self.judged if isinstance(self.settings.best, str) else self.validation

    @property
    def over(self) -> bool:
        """Whether `patience` measurements passed without a new best one."""
        waits = self.settings.patience
        return bool(waits) and self.ranking is not None and self.ranking.waited >= waits

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
        for name, act in ((SAMPLE, self.show), (EXPORT, self._export)):
            if name in wanted:
                act(step, state)
                processes.wait()

    def show(self, step: int, state: dict[str, Any]) -> None:
        """Writes previews; with a judge it measures them."""
        weights = self.learned(state)
        figures = processes.led(lambda: self._drawn(step, weights))
        if not figures or self.judged is None:
            return
        self.judged.add(step, figures)
        self.told.metrics(step, figures)
        if self.ranking is self.judged and self._ranked(step):
            self._keep_best()
            self.save(state)

    def _drawn(self, step, weights):
        """Writes previews; returns the judge's figures, {} without a judge or pictures."""
        folder, settings = self.out / "samples", self.settings
        seen = settings.method.join(self.frozen, weights).fold(), self.data, settings
        pictures, prompts = [], []
        if settings.prompts or not settings.prompts_file:
            made = preview.write(folder / f"{step:07d}.png", settings.method, *seen)
            if made is not None:
                self.told.picture(step, "samples", made.sheet)
                pictures, prompts = [*made.pictures], [*made.prompts]
        if settings.prompts_file:
            for name, (picture, prompt) in preview.lines(folder, step, *seen).items():
                self.told.picture(step, f"samples/{name}", picture)
                pictures, prompts = [*pictures, picture], [*prompts, prompt]
        return self.judged(pictures, prompts) if self.judged is not None and pictures else {}

    def _export(self, step, state):
        """Writes the current export to exports/STEP."""
        weights = self.learned(state)
        if not processes.first():
            return
        frozen, weights = self._finished(weights)
        self._write(frozen, weights, step, self.out / "exports" / f"{step:07d}")

    def measure(self, step: int, state: dict[str, Any]) -> None:
        """Measures the validation error; with best=True it keeps the state of the smallest one."""
        assert self.validation is not None
        self.told.metrics(step, {"validation": self.validation(step, self.learned(state))})
        if self.ranking is self.validation and self._ranked(step):
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

    def _found(self):
        """Returns (step, value) of the best measurement, None without `best` or a measurement."""
        return self.ranking.best if self.settings.best and self.ranking is not None else None

    def _ranked(self, step):
        """Returns whether a step is the best one so far."""
        best = self._found()
        return best is not None and best[0] == step

    def _keep_best(self):
        """Marks the checkpoint of the best step as kept."""
        best = self._found()
        if best is not None:
            self.checkpoints.kept.clear()
            self.checkpoints.kept.add(best[0])

    def _best(self, state):
        """Returns the state of the best step, or the given state if it is the best or nothing was measured."""
        best = self._found()
        if best is None or best[0] == self._step(state):
            return state
        self.checkpoints.wait()
        found = self.checkpoints.restore(self.place.gather(state), self.base, [best[0]])
        if found is None:
            raise ValueError(f"{self.out}: checkpoint {best[0]}, the best, cannot be read; best=False exports the last")
        said = f"{self.settings.best} {-best[1]:.6g}" if self.ranking is self.judged else f"validation {best[1]:.6g}"
        processes.say(f"best: step {best[0]}, {said}")
        return self.place.state(jax.tree.map(jnp.asarray, found))

    def _step(self, state):
        return int(self.place.gather(state["step"]))
