"""Picture jobs: how a worker runs them."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.images import writing
from sdjax.runtime import compile_cache
from sdjax.sampling import upscaling
from sdjax.sampling.job import Cancelled, Progress
from sdjax.sampling.settings import Interpolate
from sdjax.service import latent_colours, orders, records, suggest
from sdjax.service.library import Library
from sdjax.service.maker import Maker
from sdjax.service.place import Place
from sdjax.service.queue import CANCELLED, DONE, HALF, STOPS, WAITING, Job, Queue
from sdjax.service.request import Request

EVERY = 0.15  # seconds between two reports, of which each is a transaction
COMPILES = "/jax/compilation_cache/compile_requests_use_cache"  # the event of JAX that a program is asked for
WARM_STEPS = 2


class Drawing:
    """Makes the pictures of jobs with one Maker; stop.asked: whether this process is to end.

    Where the device's own program has to be compiled, a job's phase says so.
    """

    def __init__(self, place: Place, queue: Queue, stop: Any) -> None:
        compile_cache.keep()
        import jax

        self.place, self.queue, self.stop = place, queue, stop
        self.library = Library(place)
        self.maker = Maker(place.named)
        self.colours = latent_colours.Kept(place.root)
        self.job: Job | None = None
        self.phase = ""
        self.warmed = False
        first = jax.local_devices()[0]
        queue.options(warming=False, device=suggest.device(first.platform, first.memory_stats()))
        jax.monitoring.register_event_listener(self._event)

    # ---- a job -----------------------------------------------------------------------------------

    def make(self, job: Job) -> tuple[str, dict[str, Any]]:
        """Makes what a job lacks; returns (done, cancelled, or waiting where this process is to end, its result)."""
        self.job = job
        try:
            requests = orders.requests(self.library, job.request)
            if isinstance(requests[0].settings, Interpolate):
                state = self._way(job, requests[0])
            else:
                state = self._pictures(job, requests)
        finally:
            self.job = None
        return state, self.result(job)

    def result(self, job: Job) -> dict[str, Any]:
        """Returns {"pictures": names, "infotexts": A1111's texts, "seeds"} of the pictures that a job has by now."""
        names, texts, seeds = [], [], []
        for path in sorted(self.place.picture(f"{job.key}-0.png").parent.glob(f"{job.key}-*.png"), key=_number):
            record = records.read(path)
            names.append(path.name)
            texts.append(records.text(record))
            seeds.append([record.settings.get(name) for name in ("seed", "variation_seed")])
        return {"pictures": names, "infotexts": texts, "seeds": seeds}

    def _pictures(self, job: Job, requests: list[Request]) -> str:
        paths = [self._path(job, i) for i in range(len(requests))]
        total = len(requests)
        for first in range(0, total, self.place.batch):
            some = [i for i in range(first, min(first + self.place.batch, total))]
            lacking = [i for i in some if not paths[i].is_file()]
            if not lacking:
                continue
            if ended := self._ended(job):
                return ended
            filled = [requests[i] for i in _filled(some)]
            try:
                made = self._made(job, filled)
            except Cancelled:
                if ended := self._ended(job):
                    return ended
                self.queue.update(job.id, asked="")
                continue  # skipped
            for i, picture in zip(some, made, strict=False):
                if i in lacking:
                    self._write(paths[i], requests[i], picture)
            self.queue.update(job.id, made=sum(path.is_file() for path in paths), tries=0)
        return DONE

    def _way(self, job: Job, request: Request) -> str:
        try:
            made = self._made(job, [request])
        except Cancelled:
            return self._ended(job) or CANCELLED
        for i, picture in enumerate(made):
            self._write(self._path(job, i), request, picture, Frame=f"{i + 1}/{len(made)}")
        return DONE

    def _ended(self, job: Job) -> str:
        """Returns the state of a job that is to end now, "" where it goes on."""
        if self.stop.asked:
            return WAITING
        now = self.queue.get(job.id)
        return CANCELLED if now is None or now.asked in STOPS else ""

    def _made(self, job: Job, requests: list[Request]) -> np.ndarray:
        """Returns the pictures of some requests; raises Cancelled where the job stops or skips them."""
        self._enter("loading")
        sd = self.maker.model(requests)
        self._enter("preparing")
        shared, last = requests[0].settings, Last()
        report = self._reporting(job, upscaling.passes(shared))

        def watch(progress: Progress) -> bool:
            last.latents = progress.latents
            ends = report(progress, lambda: self._preview(job, sd, progress))
            if ends and not self.stop.asked:
                self._half(job, progress)
            return ends

        made = self.maker.make(requests, watch=watch, batch=self.place.batch)
        self._learn(sd, last.latents, made)
        return made

    def _reporting(self, job: Job, passes: int) -> Callable[[Progress, Callable[[], None]], bool]:
        """Returns what tells the queue how far the job is, and asks it whether to go on."""
        said = {"at": 0.0, "before": 0, "round": 0}

        def report(progress: Progress, preview: Callable[[], None]) -> bool:
            if progress.done <= said["before"]:
                said["round"] += 1
            said["before"] = progress.done
            now = time.monotonic()
            if now - said["at"] >= EVERY or progress.done == progress.steps:
                said["at"], self.phase = now, "sampling"
                done = said["round"] * progress.steps + progress.done
                total = max(passes, said["round"] + 1) * progress.steps
                self.queue.update(job.id, phase="sampling", step=done, steps=total)
                preview()
            there = self.queue.get(job.id)
            return self.stop.asked or there is None or there.asked != ""

        return report

    def _preview(self, job: Job, sd: Any, progress: Progress) -> None:
        colours = self.colours.of(sd)
        if colours is not None and progress.latents is not None:
            self.queue.show(job.id, colours.png(np.asarray(progress.latents[0], np.float32), sd.factor))

    def _half(self, job: Job, progress: Progress) -> None:
        """Keeps the half-done picture of a job that stops, where that is asked for."""
        now = self.queue.get(job.id)
        if now is not None and now.asked == HALF:
            self.queue.show(job.id, writing.png(progress.preview()[0]))

    def _learn(self, sd: Any, latents: Any, made: np.ndarray) -> None:
        """Fits the autoencoder's colours, once, to pictures that are all its own."""
        if latents is None or len(latents) != len(made):
            return
        if tuple(side * sd.factor for side in latents.shape[1:3]) == made.shape[1:3]:
            with contextlib.suppress(ValueError, np.linalg.LinAlgError):
                self.colours.learn(sd, np.asarray(latents, np.float32), made)

    def _path(self, job: Job, i: int) -> Path:
        return self.place.picture(f"{job.key}-{i}.png")

    def _write(self, path: Path, request: Request, picture: np.ndarray, **more: Any) -> None:
        record = self.maker.record(request, picture.shape[:2], **more)
        records.save(path, picture, record, beside=False)

    # ---- what it says ------------------------------------------------------------------------------

    def _enter(self, phase: str) -> None:
        self.phase = phase
        if self.job is not None:
            self.queue.update(self.job.id, phase=phase)

    def _event(self, event: str, **_: Any) -> None:
        if event == COMPILES and self.job is not None and self.phase not in ("compiling", "loading"):
            self._enter("compiling")

    def warm(self) -> None:
        """Compiles, once, what the usual picture of the place's model takes, while no job waits."""
        if self.warmed:
            return
        self.warmed = True
        self.queue.options(warming=True)
        with contextlib.suppress(Exception):  # a model that cannot be read is told by the first job
            usual = {"prompt": "a", "grammar": "a1111", "sampler": "euler", "schedule": "automatic"}
            (request,) = orders.requests(
                self.library, {"task": "text2img", "settings": {**usual, "steps": WARM_STEPS}, "count": 1}
            )
            self.maker.make([request], watch=lambda _: self.stop.asked)
            self.maker.record(request, (8, 8))
        self.queue.options(warming=False)


class Last:
    """The latents that were seen last."""

    latents: Any = None


def _filled(some: list[int]) -> list[int]:
    """Returns places up to the next power of two, the last one several times: few sizes of batches are compiled."""
    count = 1
    while count < len(some):
        count *= 2
    return [*some, *[some[-1]] * (count - len(some))]


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
