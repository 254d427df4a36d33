"""The Runs tab's list of jobs, and the details of one job."""

from collections.abc import Hashable
from typing import Any

from markupsafe import Markup

from sdjax.service import commands, teaching
from sdjax.service.library import Library
from sdjax.service.place import Place
from sdjax.service.queue import DONE, ENDED, FAILED, RUNNING, WAITING, Job, Queue
from sdjax.web.jobs import progress
from sdjax.web.page import charts, form, marks, stage, words
from sdjax.web.page.marks import button, tag

MOST = 100  # most jobs in the list
TAIL = 6000  # characters of a log
PLOTS = (  # title, names of metrics in it; a prefix ends with "."
    ("Loss", ("loss", "error")), ("Validation", ("validation",)), ("Rate", ("rate",)), ("Identity", ("identity",)),
    ("CLIP-I", ("clip-i",)), ("CLIP-T", ("clip-t",)),
)  # fmt: skip


def listed(queue: Queue, chosen: int | None) -> tuple[Hashable, Any]:
    """Returns (key, function that makes it) for the list of jobs: waiting ones, then the others, newest first."""
    order = queue.waiting()
    there = {job.id for job in order}
    rest = [job for job in queue.newest(MOST) if job.id not in there]
    jobs = [*order, *rest]
    chosen = chosen if chosen is not None else (jobs[0].id if jobs else None)
    key = (tuple((job.id, job.state, job.phase, job.step, job.made) for job in jobs), chosen, queue.paused)
    return key, lambda: _listed(jobs, chosen, queue.paused)


def _listed(jobs: list[Job], chosen: int | None, paused: bool) -> Markup:
    if not jobs:
        return marks.empty("Nothing has run yet", "This list keeps the pictures and runs that you start.")
    head = marks.said("The queue is paused; no new job starts.") if paused else None
    return tag("div", head, *(_row(job, job.id == chosen) for job in jobs), cls="jobs", role="listbox")


def _row(job: Job, on: bool) -> Markup:
    kind = "Teaching" if job.kind == "training" else words.TASKS.get(str(job.request.get("task")), "Pictures")
    told = [kind, words.phase(job) if job.state == RUNNING else words.STATES[job.state]]
    told += [words.ago(job.ended)] if job.ended else []
    left = words.left(job)
    told += [left] if left else []
    seen = job.pictures[:1]
    picture = tag("img", src=stage.address(job.id, 0), alt="", loading="lazy") if seen else tag("span", cls="dot")
    bar = marks.bar(progress(job), "") if job.state == RUNNING else None
    body = tag("div", tag("p", words.name(job)[:140], cls="name"), tag("p", " · ".join(told), cls="dim"), bar)
    data = {"do": "choose", "job": job.id}
    return tag(
        "div", picture, body, cls=f"job {job.state}{' on' if on else ''}", role="option", tabindex="0", data=data
    )


# ---- one job --------------------------------------------------------------------------------------------


def detail(queue: Queue, library: Library, chosen: int | None) -> tuple[Hashable, Any]:
    """Returns (key, function that makes it) for the details of a job, the newest for None."""
    job = queue.get(chosen) if chosen is not None else next(iter([*queue.waiting(), *queue.newest(1)]), None)
    if job is None:
        return None, lambda: Markup("")
    seen = len(teaching.samples(library.place.run(job.key))) if job.kind == "training" else 0
    return (job.id, job.changed, words.left(job), seen), lambda: _detail(job, library)


def _detail(job: Job, library: Library) -> Markup:
    head = tag("h3", words.name(job)[:300])
    told = [f"Job {job.id}", words.phase(job), f"from {job.source}" if job.source not in ("", "page") else ""]
    if job.started and job.ended:
        told.append(f"took {words.duration(job.ended - job.started)}")
    told.append(words.left(job))
    line = tag("p", " · ".join(filter(None, told)), cls="dim")
    bar = marks.bar(progress(job) if job.phase in ("sampling", "training") else -1, words.phase(job))
    parts: list[Any] = [head, line, bar if job.state == RUNNING else None, marks.problem(job.error) or None, _acts(job)]
    parts += _run(job, library.place) if job.kind == "training" else [_pictures(job)]
    return tag("div", *parts, _settings(job), _command(job, library), cls="detail")


def _acts(job: Job) -> Markup:
    of_run, found = job.kind == "training", []
    if of_run and job.state == DONE:
        found.append(button("Use this", "send", "main", "Make pictures with the result", to="use", job=job.id))
    if job.state == RUNNING:
        found.append(button("Stop", "stop", title="Esc", job=job.id))
    if job.state == RUNNING and of_run:
        found.append(button("Show pictures now", "sample", title="After the next step", job=job.id))
        found.append(button("Save now", "save", title="A checkpoint after the next step", job=job.id))
    if job.state == WAITING:
        found += [button("Do this next", "first", job=job.id), button("Cancel", "stop", job=job.id)]
    if job.state in ENDED and job.state != DONE:
        found.append(button("Resume" if of_run else "Try again", "resume", job=job.id))
    found.append(button("Duplicate and change", "send", title="Open its settings as a new one", to="again", job=job.id))
    if job.state in ENDED:
        found.append(button("Remove from list", "forget", title="Its files stay", job=job.id))
    return tag("div", *found, cls="acts")


def _pictures(job: Job) -> Markup:
    shown = [tag("a", tag("img", src=stage.address(job.id, n), alt="", loading="lazy"), href=stage.address(job.id, n),
                 target="_blank") for n in range(len(job.pictures))]  # fmt: skip
    return tag("div", *shown, cls="strip") if shown else Markup("")


def _run(job: Job, place: Place) -> list[Markup]:
    folder = place.run(job.key)
    figures = teaching.figures(folder)
    names = teaching.samples(folder)
    shown = [tag("figure", tag("a", tag("img", src=f"/api/jobs/{job.id}/samples/{name}", alt=name, loading="lazy"),
                               href=f"/api/jobs/{job.id}/samples/{name}", target="_blank"),
                 tag("figcaption", name.removesuffix(".png"), cls="dim")) for name in reversed(names)]  # fmt: skip
    drawn = [one for title, own in PLOTS if (one := charts.chart(title, _lines(figures, own)))]
    left = (job.result.get("export") or []) if job.state == DONE else []
    files = [tag("a", name, href=f"/api/jobs/{job.id}/export/{name}", download=True) for name in left[:40]]
    log = teaching.tail(folder / "log.txt")[-TAIL:]
    parts = [tag("div", *drawn, cls="charts") if drawn else None, tag("div", *shown, cls="strip") if shown else None]
    parts.append(_fold("Files", tag("div", *files, cls="files")) if files else None)
    parts.append(_fold("Log", tag("pre", log), job.state == FAILED) if log.strip() else None)
    return [one for one in parts if one is not None]


def _lines(figures: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """Returns {name: [(step, value)]} of metrics with one of these names, or with one as a prefix before "." or "_"."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in figures:
        for name, value in one.items():
            own = name in names or any(name.startswith((f"{prefix}.", f"{prefix}_")) for prefix in names)
            if own and isinstance(value, (int, float)) and isinstance(one.get("step"), int):
                found.setdefault(name, []).append((one["step"], float(value)))
    return found


def _settings(job: Job) -> Markup:
    settings = job.request.get("settings")
    rows = [(name, job.request[name]) for name in ("task", "recipe", "model", "init", "count") if job.request.get(name)]
    rows += list(settings.items()) if isinstance(settings, dict) else []
    body = [
        tag("tr", tag("th", form.label(str(name))), tag("td", str(form.shown(value))[:2000])) for name, value in rows
    ]
    return _fold("Settings", tag("table", *body), True)


def _command(job: Job, library: Library) -> Markup | None:
    """Returns the command line that does the same, to copy."""
    text = commands.of(library, job)
    if not text:
        return None
    copy = button("Copy", "copy", title="Copy the command", text=text)
    return _fold("Command", tag("div", tag("pre", text), tag("div", copy, cls="acts")))


def _fold(title: str, inside: Markup, opened: bool = False) -> Markup:
    return tag("details", tag("summary", title), inside, open=opened)
