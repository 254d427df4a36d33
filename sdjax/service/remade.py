"""Turns a picture's record into settings for a new request, and lists what differs."""

import re
import sys
from pathlib import Path
from typing import Any

from sdjax.sampling.fields import fields
from sdjax.sampling.settings import TASKS
from sdjax.service import provenance, records
from sdjax.settings import SettingError


def values(path: str | Path, task: str) -> dict[str, Any]:
    """Returns {setting: value} of a picture's record for a task.

    No value names a file to open: built-in models keep their names, any other model is None.
    Raises SettingError if another task made the picture from more than its prompt.
    """
    record = records.read(path)
    if record.task not in ("text2img", task):
        raise SettingError(
            "from_image", str(path), f"sdjax {record.task}, with its files", f"was made by {record.task}"
        )
    known, found = fields(TASKS[task]), {}
    for name, value in record.settings.items():
        if name in known and not known[name].about.file and name != "adapter":
            found[name] = value
    return found | provenance.kept_model(record.settings, record.hashes) | _of_a1111(path, record, known)


def differences(path: str | Path, made: records.Record) -> list[str]:
    """Returns lines that say how the files of a record and of a new record made from it differ."""
    record, lines = records.read(path), []
    for name, found in record.hashes.items():
        if made.hashes.get(name) != found:
            lines.append(f"{path} was made with {name} {found}, which this run does not use")
    if record.task == made.task == "text2img" and record["image"] and not made["image"]:
        lines.append(f"{path} was made with {record['image']}: --image")
    wanted, given = (", ".join(one["adapter"]) or "none" for one in (record, made))
    if wanted != given:
        lines.append(f"{path} was made with adapters {wanted}; given: {given}")
    return lines


def _of_a1111(path, record, known):
    """Returns the settings of A1111's keys without a setting of ours, and notes differences."""
    more, found = record.more, {}
    if "Hires resize" in more:
        found["hires"] = _scale(path, record["size"], more["Hires resize"])
    for name, value in record.settings.items():
        choices = known[name].choices if name in known else None
        if choices is not None and value is not None and value not in choices and (near := choices.near(value)):
            found[name] = near
            said = f"{known[name].about.word} {value}, which sdjax does not have: {near}"
            print(f"note: {path} was made with {said}", file=sys.stderr)
    if more.get("Emphasis", "Original") != "Original":
        said = f"Emphasis: {more['Emphasis']}, which sdjax does not have: weights act as in Original"
        print(f"note: {path} was made with {said}", file=sys.stderr)
    return found


def _scale(path, size, resize):
    """Returns the factor of A1111's "Hires resize: WIDTHxHEIGHT"; a side of 0 follows from the other."""
    sides = re.fullmatch(r"(\d+)x(\d+)", resize)
    scales = {int(side) / own for side, own in zip(sides.groups(), reversed(size), strict=True)} if sides else set()
    scales.discard(0)
    if len(scales) != 1:
        said = f"Hires resize {resize} of {size[1]}x{size[0]}"
        raise ValueError(f"--from-image {path}: {said}: expected WIDTHxHEIGHT of the same proportions")
    return scales.pop()
