"""Lists of pictures to make: rows of JSONL, CSV or parquet, each with settings of its own.

    {"prompt": "a photo of a face", "seed": 7}
    {"prompt": ["a fox", "an owl"], "seed": "0-9", "guidance": [3, 7.5], "steps": 30}        # 2 x 10 x 2 pictures

    pictures, errors = read("jobs.jsonl", {"steps": 20})
    for settings, group in grouped(pictures): ...

A field that is a list, or a number or size written as "0-9" or "3|7.5", is a matrix: every combination becomes a
picture.  A row that cannot be used is an error in `errors` and never the end of a run.
"""

import csv
import dataclasses
import itertools
import json
import re
from pathlib import Path

from sdjax import grammar

NUMBERS = {"seed": int, "steps": int, "skip": int, "ensd": int}
NUMBERS |= {"guidance": float, "eta": float, "rescale": float, "strength": float}
NUMBERS |= dict.fromkeys(("guidance_start", "guidance_end", "threshold", "threshold_limit"), float)
NUMBERS |= dict.fromkeys(("churn", "churn_low", "churn_high", "churn_noise"), float)
TEXTS = ("prompt", "negative", "sampler", "schedule", "image", "mask", "resize")
TEXTS += ("grammar", "weighting", "noise_source", "name")
FIELDS = (*TEXTS, *NUMBERS, "size")
SHARED = ("prompt", "negative", "seed", "image", "mask", "name")  # what may differ between pictures of one call
READERS = ("jsonl", "csv", "parquet")
MOST = 100_000  # pictures of one row: a typing error should not fill a disk


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture to make: its name, unique in the list, the row it comes from, counted from 1, and its settings."""

    name: str
    row: int
    settings: dict


def read(path, defaults=None):
    """Returns (pictures, errors): list of Picture, and list of {"row", "error"}.

    defaults: settings for the fields that a row does not have.
    Raises ValueError when the file as a whole cannot be read.
    """
    pictures, errors, names = [], [], set()
    for number, row in enumerate(_rows(Path(path)), start=1):
        try:
            if isinstance(row, ValueError):
                raise row
            made = _pictures(number, {**(defaults or {}), **row})
            taken = names & {picture.name for picture in made}
            if taken:
                raise ValueError(f"name={min(taken)!r}: there is a picture of this name already")
            names |= {picture.name for picture in made}
            pictures += made
        except ValueError as error:
            errors.append({"row": number, "error": str(error)})
    return pictures, errors


def grouped(pictures):
    """Yields (settings, pictures) for each set of settings that pictures share, in order of their first appearance.

    settings: all but SHARED; which of image and mask there are, and which adapters the prompts ask for, is the same
    within a group.
    """
    groups = {}
    for picture in pictures:
        shared = {name: value for name, value in picture.settings.items() if name not in SHARED}
        kinds = tuple(name in picture.settings for name in ("image", "mask"))
        kinds = (*kinds, repr(prompt(picture.settings)[1]))
        groups.setdefault(json.dumps([shared, kinds], sort_keys=True), (shared, []))[1].append(picture)
    yield from groups.values()


def prompt(settings):
    """Returns (prompt without its adapters, the grammar.Adapters that it asks for) of a picture's settings."""
    if settings.get("grammar") != "a1111":
        return settings["prompt"], ()
    return grammar.adapters(settings["prompt"])


def expand(row):
    """Returns the rows of a row whose fields may be lists, first field slowest."""
    values = [value if isinstance(value, list) else [value] for value in row.values()]
    return [dict(zip(row, some, strict=True)) for some in itertools.product(*values)]


def _pictures(number, row):
    row = {name: _several(name, value) for name, value in row.items() if value not in (None, "") or name == "prompt"}
    unknown = [name for name in row if name not in FIELDS]
    if unknown:
        raise ValueError(f"{unknown[0]}: no such field; accepted are {', '.join(FIELDS)}")
    if "prompt" not in row:
        raise ValueError("prompt: missing")
    count = 1
    for value in row.values():
        count *= len(value) if isinstance(value, list) else 1
    if not 1 <= count <= MOST:
        raise ValueError(f"{count} pictures of one row: expected 1 to {MOST}")
    rows = expand(row)
    stem = f"{number:06d}"
    made = []
    for index, settings in enumerate(rows):
        name = settings.pop("name", None) or stem
        if not re.fullmatch(r"[\w][\w. -]*", name):
            raise ValueError(f"name={name!r}: expected letters, digits, '.', '_', '-' and spaces")
        prompt(settings)  # an adapter that cannot be read is this row's error
        made.append(Picture(f"{name}-{index:05d}" if len(rows) > 1 else name, number, settings))
    return made


def _several(name, value):
    """Returns a field's value checked and in its type, or a list of such."""
    if name in NUMBERS and isinstance(value, str):
        span = re.fullmatch(r"(\d+)-(\d+)", value.strip()) if NUMBERS[name] is int else None
        if span:
            first, last = map(int, span.groups())
            if last - first >= MOST:
                raise ValueError(f"{name}={value!r}: expected at most {MOST} numbers")
            return list(range(first, last + 1))
    if name not in TEXTS and isinstance(value, str) and "|" in value:
        return [_one(name, part) for part in value.split("|")]
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{name}=[]: expected at least one value")
        return [_one(name, part) for part in value]
    return _one(name, value)


def _one(name, value):
    if name in NUMBERS:
        kind = NUMBERS[name]
        try:
            number = kind(value)
        except (TypeError, ValueError):
            number = None
        if number is None or isinstance(value, bool) or (kind is int and float(value) != number):
            raise ValueError(f"{name}={value!r}: expected {'a whole number' if kind is int else 'a number'}")
        return number
    if name == "size":
        return _size(value)
    if name in TEXTS and not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: expected a text")
    return value


def _size(value):
    """Returns pixels of 64 and "64", (height, width) of "WIDTHxHEIGHT"."""
    try:
        sides = [int(part) for part in str(value).lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"size={value!r}: expected pixels, or WIDTHxHEIGHT such as 768x512")
    return sides[0] if len(sides) == 1 else tuple(reversed(sides))


def _rows(path):
    """Yields rows as dicts, or the ValueError of a line that is none."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in READERS:
        raise ValueError(f"{path}: expected a file ending in {', '.join('.' + name for name in READERS)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    yield from {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}[kind](path)


def _jsonl(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            try:
                row = json.loads(line)
                yield row if isinstance(row, dict) else ValueError(f"{line[:60]!r}: expected an object")
            except json.JSONDecodeError as error:
                yield ValueError(f"{line[:60]!r}: {error.msg} at column {error.colno}")


def _csv(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            if None in row:
                yield ValueError(f"more cells than the header's {len(row) - 1}")
            else:
                yield row


def _parquet(path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow; pip install pyarrow, or give .jsonl or .csv") from error
    try:
        yield from parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
