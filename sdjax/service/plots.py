"""Makes many jobs of one request: a table of pictures whose settings vary along axes, or the rows of a list.

    axes = [Axis("steps", "10-30 (+10)"), Axis("sampler", "euler, ddim")]
    for order in plotted(library, "text2img", values, axes): queue.add("pictures", order)

An order of a table has "plot": {"key", "axes": [[name, [value, ...]], ...], "at": [i, ...]}.
Source of ranges, "1-5 (+2)" and "0-1 [5]", and of "prompt": AUTOMATIC1111's stable-diffusion-webui 1.10, xyz_grid.
"""

import csv
import itertools
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.sampling.fields import Field, Size, checked, fields
from sdjax.sampling.settings import NAMES, TASKS
from sdjax.service import lists, orders
from sdjax.service.library import Library
from sdjax.settings import SettingError

MOST = 200  # pictures of a table or a list
NUMBER = r"-?\d+(?:\.\d+)?"
RANGE = re.compile(rf"({NUMBER})\s*-\s*({NUMBER})(?:\s*\(([+-]\d+(?:\.\d+)?)\s*\)|\s*\[(\d+)\s*\])?")


@dataclass(frozen=True)
class Axis:
    """A setting and its values as text: "10, 20, 30", "1-5", "1-9 (+2)", "0-1 [5]".

    For "prompt", the first value is a part of the prompt, which the others replace.
    """

    name: str
    text: str


def names(task: str) -> list[str]:
    """Returns the names of a task's settings that may be an axis."""
    return [name for name, one in fields(TASKS[task]).items() if _may(one)]


def _may(one: Field) -> bool:
    return not (one.about.file or one.about.mine or one.several) or one.name in ("model", "vae")


def points(one: Field, text: str) -> list[Any]:
    """Returns the values of an axis.  Raises SettingError for an invalid value or none."""
    parts = [part.strip() for part in next(csv.reader([text], skipinitialspace=True), [])]
    if one.kind in (int, float):
        parts = [value for part in parts for value in _range(one, part)]
    plain = one.about.file or one.name == "prompt"
    found = [value if plain else checked(one, value, text=True) for value in parts if value != ""]
    if not found:
        raise SettingError(one.name, text, "values separated by commas")
    return found


def _range(one: Field, part: str) -> list[Any]:
    """Returns the numbers of "1-5", "1-9 (+2)" or "0-1 [5]"; [text] for other text."""
    match = RANGE.fullmatch(part)
    if match is None:
        return [part]
    first, last = float(match[1]), float(match[2])
    if match[4]:
        count = int(match[4])
        found = [first + (last - first) * i / max(1, count - 1) for i in range(min(count, MOST + 1))]
    else:
        step = float(match[3] or (1 if last >= first else -1))
        if step == 0 or (last - first) / step < 0:
            raise SettingError(one.name, part, "a finite range, such as 1-5 (+2)")
        found = [first + step * i for i in range(min(int((last - first) / step + 1e-9) + 1, MOST + 1))]
    return [round(value) if one.kind is int else round(value, 6) for value in found]


def plotted(library: Library, task: str, values: Mapping[str, Any], axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Returns the orders of a table's pictures; all share one seed unless it is an axis.

    Raises SettingError for an invalid axis, too many pictures, and invalid settings.
    """
    there = names(task)
    for axis in axes:
        if axis.name not in there:
            raise SettingError("axis", axis.name, f"one of {', '.join(there)}")
    known = fields(TASKS[task])
    every = [points(known[axis.name], axis.text) for axis in axes]
    count = 1
    for some in every:
        count *= len(some)
    if not axes or count > MOST:
        raise SettingError("axes", count, f"1 to {MOST} pictures")
    kept = {**values, "seed": values.get("seed", 0)}
    if kept["seed"] == -1:
        kept["seed"] = secrets.randbelow(1 << 32)
    told = [[axis.name, [str(value) for value in some]] for axis, some in zip(axes, every, strict=True)]
    made, key = [], secrets.token_hex(8)
    for at in itertools.product(*(range(len(some)) for some in every)):
        changed = dict(kept)
        for axis, some, i in zip(axes, every, at, strict=True):
            changed[axis.name] = _changed(changed, axis.name, some, i)
        order = orders.pictures(library, task, changed, 1)
        made.append({**order, "plot": {"key": key, "axes": told, "at": list(at)}})
    return made


def _changed(values: Mapping[str, Any], name: str, some: Sequence[Any], i: int) -> Any:
    if name != "prompt":
        return some[i]
    if some[0] not in values.get(name, ""):
        raise SettingError(name, some[0], "a first value that occurs in the prompt")
    return values[name].replace(some[0], some[i])


def listed(library: Library, path: Path, usual: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns (orders of the rows of a list, errors of invalid rows).

    usual: settings for rows that omit them.  Raises ValueError for an unreadable list and too many rows.
    """
    requests, errors = lists.read(path, dict(usual))
    if len(requests) > MOST:
        raise SettingError("list", len(requests), f"at most {MOST} pictures")
    made, said = [], [f"row {one['row']}: {one['error']}" for one in errors]
    for one in requests:
        known, settings = fields(type(one.settings)), one.settings
        named = {name: getattr(settings, name) for name in known if not known[name].about.mine}
        values = {
            name: str(value) if isinstance(value, Size) else value
            for name, value in named.items()
            if value != known[name].usual or name in ("prompt",)
        }
        try:
            made.append(orders.pictures(library, NAMES[type(settings)], values, 1))
        except SettingError as error:
            said.append(f"row {one.row}: {error}")
    return made, said
