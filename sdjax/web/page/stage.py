"""The column beside the form: the running job with its preview, and finished pictures."""

from collections.abc import Hashable, Sequence
from typing import Any

from markupsafe import Markup

from sdjax.service.queue import RUNNING, WAITING, Job, Queue
from sdjax.web.jobs import progress
from sdjax.web.page import marks, words
from sdjax.web.page.marks import button, tag

MOST = 60  # most jobs whose pictures are shown
SENT = (
    ("change", "Change", "Begin another picture with this one"),
    ("repaint", "Repaint", "Paint over a part of it"),
    ("enlarge", "Enlarge", "Make it larger"),
    ("follow", "Follow its shape", "Use it with a ControlNet"),
    ("teach", "Teach", "Learn from it"),
    ("reuse", "Use its settings", "Fill the form with its settings"),
    ("info", "What made it", "Read the settings in the file"),
)


def address(job: int, number: int) -> str:
    """Returns the URL of a picture's file."""
    return f"/api/jobs/{job}/pictures/{number}"


def current(queue: Queue, kind: str) -> tuple[Job | None, int]:
    """Returns (the running job of a kind, else the first waiting one; the number of jobs waiting behind it)."""
    jobs = queue.waiting()  # running jobs come first
    own = next((job for job in jobs if job.kind == kind), None)
    return own, sum(job.state == WAITING and job is not own for job in jobs)


def now(queue: Queue, kind: str) -> tuple[Hashable, Any]:
    """Returns (key, function that makes it) for the card of the running or waiting job."""
    job, behind = current(queue, kind)
    failed = _failed(queue, kind) if job is None else None
    said = words.left(job) if job is not None else ""
    key = (job and (job.id, job.state, job.phase, job.step, job.made, job.asked), behind, said, failed and failed.id,
           queue.paused, bool(queue.option("warming")))  # fmt: skip
    return key, lambda: _now(queue, job, behind, failed)


def _failed(queue: Queue, kind: str) -> Job | None:
    """Returns the newest job of a kind if it failed, else None."""
    newest = next((job for job in queue.newest(20) if job.kind == kind), None)
    return newest if newest is not None and newest.state == "failed" else None


def _now(queue: Queue, job: Job | None, behind: int, failed: Job | None) -> Markup:
    if job is None:
        if failed is None:
            return Markup("")
        text = f"{words.name(failed)[:60]}: {failed.error}"
        return tag("div", marks.problem(text), button("Try again", "resume", job=failed.id), cls="card failed")
    return card(queue, job, behind)


def card(queue: Queue, job: Job, behind: int = 0) -> Markup:
    """Returns the card of a running or waiting job: preview, phase, progress, time left, buttons."""
    share = progress(job)
    seen = job.state == RUNNING and job.phase == "sampling" and queue.preview(job.id) is not None
    picture = tag("img", src=f"/api/jobs/{job.id}/preview?at={job.step}.{job.made}", alt="preview") if seen else None
    unknown = job.state == RUNNING and job.phase not in ("sampling", "training")
    told = [words.phase(job)]
    if job.state == RUNNING and job.kind == "pictures" and job.count > 1:
        told.append(f"{job.made} of {job.count} pictures")
    if job.kind == "training" and job.steps:
        told.append(f"step {job.step} of {job.steps}")
    told += filter(None, [words.left(job), f"{words.count(behind, 'job')} behind it" if behind else ""])
    if job.state == WAITING and queue.option("warming"):
        told = [words.PHASES["compiling"]]
    if queue.paused and job.state == WAITING:
        told = ["The queue is paused"]
    line = tag("p", tag("span", *_joined(told)), cls="told")
    act = [button("Stop" if job.state == RUNNING else "Cancel", "stop", title="Esc", job=job.id)]
    if job.state == RUNNING and job.kind == "pictures" and job.count > 1:
        act.append(button("Skip this one", "skip", job=job.id))
    bar = marks.bar(-1 if unknown else share, words.phase(job))
    body = tag("div", tag("p", words.name(job)[:200], cls="name"), line, bar, tag("div", *act, cls="acts"), cls="body")
    return tag("div", picture, body, cls=f"card now {job.state}", data={"id": job.id})


def _joined(told: Sequence[str]) -> list[Any]:
    return [" · ".join(told)]


# ---- pictures -------------------------------------------------------------------------------------


def made(queue: Queue) -> list[tuple[Job, int]]:
    """Returns (job, number) of the finished pictures, newest first."""
    jobs = [job for job in queue.newest(4 * MOST) if job.kind == "pictures" and job.pictures][:MOST]
    return [(job, number) for job in jobs for number in range(len(job.pictures))]


def gallery(queue: Queue, chosen: Sequence[int] | None) -> tuple[Hashable, Any]:
    """Returns (key, function that makes it) for the chosen picture (None: the newest) above all pictures."""
    there = made(queue)
    key = (tuple((job.id, number) for job, number in there), chosen and tuple(chosen))
    return key, lambda: _gallery(there, chosen)


def _gallery(there: list[tuple[Job, int]], chosen: Sequence[int] | None) -> Markup:
    if not there:
        return marks.empty(
            "Your pictures appear here", "Describe one on the left and press Generate. Nothing leaves this computer."
        )
    job, number = next(((job, n) for job, n in there if chosen and [job.id, n] == list(chosen)), there[0])
    small = [_small(one, n, one is job and n == number) for one, n in there]
    return tag("div", _large(job, number), tag("div", *small, cls="grid", role="listbox"), cls="gallery")


def _large(job: Job, number: int) -> Markup:
    where, seeds = address(job.id, number), job.result.get("seeds", [])
    seed = seeds[number][0] if number < len(seeds) and seeds[number] else None
    told = f"Seed {seed} · {words.ago(job.ended)}" if seed is not None else words.ago(job.ended)
    acts = [button(label, "send", title=title, to=to, job=job.id, number=number) for to, label, title in SENT]
    name = f"sdjax-{job.id}-{number}.png"
    acts.append(tag("a", "Download", cls="act", href=where, download=name, title="The PNG with its settings"))
    acts.append(tag("a", "Open", cls="act", href=where, target="_blank", title="In its own tab"))
    picture = tag("img", src=where, alt=words.name(job)[:300])
    caption = tag("figcaption", tag("p", words.name(job), cls="prompt"), tag("p", told, cls="dim"))
    return tag("figure", tag("div", picture, cls="frame"), caption, tag("div", *acts, cls="acts"), cls="large")


def _small(job: Job, number: int, on: bool) -> Markup:
    picture = tag("img", src=address(job.id, number), alt=words.name(job)[:300], loading="lazy")
    return tag("div", picture, cls="small on" if on else "small", role="option", tabindex="0",
               data={"do": "choose", "job": job.id, "number": number})  # fmt: skip
