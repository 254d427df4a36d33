"""Shared by the tabs: services, events with error messages, and components that refresh every second.

    desk.live(output, show, inputs)                     show(*inputs) -> (key, make); calls make() if the key changed
    desk.on(button.click, do, inputs, outputs, problem) shows an error of do in `problem`, as one sentence

Events are short: they add jobs and read the queue, so that a closed tab loses nothing.
"""

import functools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from sdjax.service.library import Entry
from sdjax.service.queue import Job
from sdjax.web.page import marks
from sdjax.web.services import Services

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
EVERY = 1.0  # seconds between refreshes, one request each
OLD = 4.0  # seconds that a list of the library is cached: reading it walks the folders
Shown = tuple[Hashable, Callable[[], Any]]


@dataclass(frozen=True)
class Live:
    """A component that follows the queue; show(*values of inputs) -> (key, make).

    jobs: it depends on jobs and inputs only, so it needs no refresh while they stay the same.
    """

    output: Any
    show: Callable[..., Shown]
    inputs: tuple[Any, ...] = ()
    jobs: bool = False


class Recent:
    """The result of a function, cached for some seconds."""

    def __init__(self, find: Callable[[], Any], seconds: float) -> None:
        self.find, self.seconds, self.found, self.when = find, seconds, None, -math.inf

    def __call__(self) -> Any:
        """Returns the cached or a new result."""
        if time.monotonic() - self.when > self.seconds:
            self.found, self.when = self.find(), time.monotonic()
        return self.found


@dataclass
class Desk:
    """Shared by the tabs.

    places: components and functions that a tab offers to others, by its name.  followed: components that follow the
    queue.  waiting: events that refresh them.
    """

    services: Services
    tabs: Any = None
    places: dict[str, Any] = field(default_factory=dict)
    followed: list[Live] = field(default_factory=list)
    seen: Any = None
    waiting: list[Any] = field(default_factory=list)
    entries: Callable[[], list[Entry]] = list  # of the library, cached for OLD seconds

    def __post_init__(self) -> None:
        self.entries = Recent(self.services.library.entries, OLD)

    def live(self, output: Any, show: Callable[..., Shown], inputs: Sequence[Any] = (), jobs: bool = False) -> None:
        """Makes a component follow the queue; see Live."""
        self.followed.append(Live(output, show, tuple(inputs), jobs))

    def on(
        self,
        triggers: Any,
        do: Callable[..., Any],
        inputs: Sequence[Any] = (),
        outputs: Sequence[Any] = (),
        problem: Any = None,
        js: str | None = None,
    ) -> Any:
        """Calls `do` on an event, which it returns; do returns one value per output, or one for all."""
        told = [] if problem is None else [problem]

        @functools.wraps(do)
        def safely(*given: Any, **more: Any) -> Any:
            try:
                found = do(*given, **more)
            except (ValueError, OSError) as error:
                if problem is None:
                    raise
                return _one([marks.problem(self.said(error)), *[gr.skip()] * len(outputs)])
            found = list(found) if isinstance(found, (list, tuple)) else [found] * len(outputs)
            return _one([""] * len(told) + found)

        listen = functools.partial(gr.on, triggers) if isinstance(triggers, list) else triggers
        return listen(safely, list(inputs), [*told, *outputs], js=js, **QUIET)

    def job(self, id: Any) -> Job:
        """Returns a job.  Raises ValueError if it was removed."""
        job = self.services.queue.get(int(id))
        if job is None:
            raise ValueError("this job was removed")
        return job

    def said(self, error: Exception) -> str:
        """Returns an error as a sentence with the page's names of settings."""
        text = self.services.said(error, lambda name: name.replace("_", " ").capitalize())
        return text[:1].upper() + text[1:]

    def look(self, event: Any) -> Any:
        """Refreshes the followers of the queue after an event, which it returns."""
        self.waiting.append(event)
        return event

    def begin(self, load: Any) -> None:
        """Refreshes the followers of the queue when the page opens and every second."""
        timer = gr.Timer(EVERY)
        for event in self.waiting:
            event.then(self._look, self._inputs(), self._outputs(), **QUIET)
        gr.on([load, timer.tick], self._look, self._inputs(), self._outputs(), trigger_mode="once", **QUIET)

    def _inputs(self) -> list[Any]:
        return [self.seen, *(one for live in self.followed for one in live.inputs)]

    def _outputs(self) -> list[Any]:
        return [self.seen, *(live.output for live in self.followed)]

    def _look(self, seen: dict[int, Any] | None, *given: Any) -> list[Any]:
        seen, values, found = dict(seen or {}), list(given), []
        clock = self.services.queue.clock()
        for number, live in enumerate(self.followed):
            own = [values.pop(0) for _ in live.inputs]
            state, (before, key) = (clock, repr(own)) if live.jobs else None, seen.get(number, (None, self))
            if state is not None and state == before:
                found.append(gr.skip())
                continue
            now, make = live.show(*own)
            found.append(gr.skip() if now == key else make())
            seen[number] = state, now
        return [seen, *found]


def _one(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
