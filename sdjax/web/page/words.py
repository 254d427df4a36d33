"""What the page calls jobs, phases, times and errors."""

import time

from sdjax.service.queue import CANCELLED, DONE, FAILED, RUNNING, STOPPED, STOPS, WAITING, Job
from sdjax.web.jobs import progress

STATES = {
    WAITING: "Waiting", RUNNING: "Running", DONE: "Done", FAILED: "Failed", CANCELLED: "Cancelled", STOPPED: "Stopped",
}  # fmt: skip
PHASES = {
    "starting": "Starting", "loading": "Loading the model", "preparing": "Preparing", "sampling": "Drawing",
    "compiling": "Preparing the program: only the first time for these settings", "training": "Learning",
}  # fmt: skip
TASKS = {
    "text2img": "Create", "img2img": "Change a picture", "inpaint": "Repaint a part", "upscale": "Enlarge",
    "controlnet": "Follow a shape", "interpolate": "Morph",
}  # fmt: skip


def phase(job: Job) -> str:
    """Returns what a job does now."""
    if job.state != RUNNING:
        return STATES[job.state]
    if job.asked in STOPS:
        return "Stopping"
    if job.kind == "training" and job.phase == "preparing":
        return "Preparing to learn: only the first time for these settings"
    return PHASES.get(job.phase, job.phase.capitalize())


def name(job: Job) -> str:
    """Returns what a job is called."""
    if job.kind == "training":
        return str(job.request.get("name") or job.request.get("recipe") or "Run")
    settings = job.request.get("settings")
    prompt = settings.get("prompt") if isinstance(settings, dict) else None
    return str(prompt or TASKS.get(str(job.request.get("task")), "Pictures"))


def left(job: Job) -> str:
    """Returns how long a running job takes by now's pace, "" where that is not known."""
    done = progress(job)
    if job.state != RUNNING or job.started is None or done <= 0.02 or job.phase not in ("sampling", "training"):
        return ""
    return f"about {duration((time.time() - job.started) * (1 - done) / done)} left"


def duration(seconds: float) -> str:
    """Returns seconds in words: "40 s", "3 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def ago(when: float | None) -> str:
    """Returns how long ago a time was."""
    if when is None:
        return ""
    seconds = time.time() - when
    return "just now" if seconds < 20 else f"{duration(seconds)} ago"


def count(number: int, noun: str) -> str:
    """Returns "1 picture", "2 pictures"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
