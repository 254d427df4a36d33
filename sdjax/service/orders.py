"""A job's request as plain values, checked on arrival and again by the worker.

    order = pictures(library, "text2img", {"prompt": "a cat", "seed": -1}, count=4)
    requests(library, order)                # list of Request

Requests from HTTP or the database use the library's names of models and the names of uploads.  Both are looked up and
never become part of a path.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdjax.formats.adapters import attach
from sdjax.sampling.fields import Field, Size, fields, make
from sdjax.sampling.settings import TASKS, Interpolate, Task
from sdjax.service.library import Library
from sdjax.service.request import Request, check_named, several, taken_apart
from sdjax.settings import UNSAID, SettingError, nearest

MOST = 100  # pictures of one job
NAMED = {"model": "model", "vae": "vae", "control": "controlnet"}  # settings whose values are names in the library


def pictures(library: Library, task: str, values: Mapping[str, Any], count: int = 1) -> dict[str, Any]:
    """Returns the order of `count` pictures of a task, with a random seed for each -1.

    values: settings, with the library's and uploads' names for files; the default model is the place's.
    Raises SettingError for invalid settings.
    """
    if task not in TASKS:
        raise SettingError("task", task, f"one of {', '.join(TASKS)}")
    if type(count) is not int or not 1 <= count <= MOST:
        raise SettingError("count", count, f"a whole number, 1 to {MOST}")
    if TASKS[task] is Interpolate and count != 1:
        raise SettingError("count", count, "1 for an interpolation")
    made = _settings(library, task, values).drawn()
    made.check_most(MOST)
    known, kept = fields(TASKS[task]), _names(library, values)
    for name, one in known.items():
        value = getattr(made, name)
        if name not in NAMED and not one.about.mine and value != one.usual:
            kept[name] = str(value) if isinstance(value, Size) else value
    return {"task": task, "settings": kept, "count": count}


def _names(library: Library, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that name entries of the library, with their full names."""
    found = {}
    for name, kind in NAMED.items():
        value = values.get(name)
        if isinstance(value, str) and name != "control":
            found[name] = library.find(kind, value, name).name
        elif value is not None:
            found[name] = [library.find(kind, one, name).name for one in ([value] if isinstance(value, str) else value)]
    return found


def requests(library: Library, order: Mapping[str, Any]) -> list[Request]:
    """Returns the requests of an order.  Raises SettingError for an invalid order or an unknown name."""
    task, values, count = order.get("task"), order.get("settings"), order.get("count")
    if not isinstance(task, str) or task not in TASKS or not isinstance(values, dict):
        raise SettingError("task", task, f"one of {', '.join(TASKS)}, with settings")
    if type(count) is not int or not 1 <= count <= MOST:
        raise SettingError("count", count, f"a whole number, 1 to {MOST}")
    made = _settings(library, task, values)
    made.check_most(MOST)
    folder = (library.place.root / "uploads").resolve()
    return [dataclasses.replace(one, folder=folder) for one in several([made], count)]


def _settings(library: Library, task: str, values: Mapping[str, Any]) -> Task:
    """Returns the settings for the Maker, with paths instead of names."""
    known, found = fields(TASKS[task]), {}
    for name, value in values.items():
        if name not in known:
            raise SettingError(name, UNSAID, nearest(name, known), "unknown")
        if value is not None:
            found[name] = _looked_up(library, known[name], value)
    found.setdefault("model", library.place.model)
    made = make(TASKS[task], {"dtype": library.place.dtype, **found})
    check_named(made)
    folder = attach.Folder(library.place.named)
    for one in taken_apart(made)[1]:
        attach.find(folder, one.name)
    return made


def _looked_up(library: Library, field: Field, value: Any) -> Any:
    """Returns a setting's value, with the path of the file it names."""
    name, about = field.name, field.about
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if name in NAMED:
        if not all(isinstance(item, str) for item in items):
            raise SettingError(name, value, "a name in the library")
        found = [library.find(NAMED[name], item, name).source for item in items]
    elif about.mine:
        raise SettingError(name, UNSAID, "what the server was started with", "is not for requests")
    elif about.file:
        found = [_upload(library, name, item) for item in items]
    else:
        return value
    return tuple(found) if field.several else found[0]


def _upload(library: Library, name: str, value: Any) -> str:
    try:
        if isinstance(value, str) and library.place.upload(value).is_file():
            return value
    except ValueError:
        pass
    raise SettingError(name, value, "the name of an upload")
