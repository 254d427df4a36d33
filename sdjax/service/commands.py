"""The command line that does what a job does, for a terminal on the server.

of(library, job)          # "sdjax text2img --prompt 'a cat' --steps 30"
"""

import shlex
from collections.abc import Mapping
from typing import Any

from sdjax.sampling.fields import fields
from sdjax.sampling.settings import TASKS
from sdjax.service import flags, orders, programs, teaching
from sdjax.service.library import Library
from sdjax.service.queue import Job


def of(library: Library, job: Job) -> str:
    """Returns the command of a job, "" for one without: tools, plots' cells without settings, damaged requests."""
    try:
        if job.kind == "training":
            recipe, items = teaching.overrides(library, job.request)  # the run's folder is the program's own choice
            return shlex.join(["sdjax", "train", str(recipe), *items])
        return shlex.join(["sdjax", str(job.request["task"]), *_pictures(library, job.request)])
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return ""  # a model is gone, or a request is not one of ours


def _pictures(library: Library, order: Mapping[str, Any]) -> list[str]:
    """Returns the flags of an order that differ from the program's defaults."""
    task, place = order["task"], library.place
    (first, *_) = orders.requests(library, {**order, "count": 1})
    known, usual = fields(TASKS[task]), programs.usual(task)
    said = []
    for name, one in known.items():
        value = getattr(first.settings, name)
        if value == usual.get(name, one.usual):
            continue
        if one.about.file and one.about.own or name == "control_image":  # uploads
            names = value if one.several else [value]
            value = tuple(str(place.upload(item)) for item in names)
        said += _flag(name, value)
    said += ["--count", str(order["count"])] if order.get("count", 1) != 1 else []
    return [*said, "--adapters", str(place.named)] if place.named.is_dir() else said


def _flag(name: str, value: Any) -> list[str]:
    """Returns the words of a flag; one with a value that looks like a flag is one word."""
    if isinstance(value, bool):
        return [flags.flag(name if value else f"no_{name}")]
    values = [str(item) for item in value] if type(value) is tuple else [str(value)]
    if any(item.startswith("-") for item in values):
        return [f"{flags.flag(name)}={item}" for item in values]
    return [flags.flag(name), *values]
