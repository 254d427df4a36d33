"""Lists of pictures: rows of JSONL, CSV or parquet, each with its own settings.

    {"prompt": "a photo of a face", "seed": 7}
    {"prompt": ["a fox", "an owl"], "seed": "0-9", "guidance": [3, 7.5], "steps": 30}        # 2 x 10 x 2 pictures

    requests, errors = read("jobs.jsonl", {"steps": 20})

A field is a setting (sampling/settings.py), `name` or `task`.  Without `task`, the fields mask, image and control_image
decide it.  A list, or a number or size such as "0-9" or "3|7.5", makes a matrix: every combination becomes a picture.
Each -1 among a row's seeds becomes a random number, the same in all pictures of that seed.
An invalid row becomes an entry of `errors` and does not stop a run.
"""

import codecs
import csv
import functools
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdjax.runtime.guard import named
from sdjax.sampling.fields import Field, checked, fields, make, understood
from sdjax.sampling.settings import FIRST, SEEDED, TASKS
from sdjax.service.request import Request, check_named, taken_apart
from sdjax.settings import UNSAID, SettingError, nearest, shown

READERS = ("jsonl", "csv", "parquet")
MOST = 100_000  # pictures of one row, so that a typing error fills no disk
WHOLE = 200_000  # requests of a list, which all lie in memory
LONGEST = 200  # bytes of a name; with suffixes, file systems take 255
# Device names on Windows, with any suffix: Microsoft, "Naming Files, Paths, and Namespaces".
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{kind}{i}" for kind in ("COM", "LPT") for i in "123456789")}
KNOWN = {name: one for task in TASKS.values() for name, one in fields(task).items()}
WITH = {"control_image": "controlnet", "mask": "inpaint", "image": "img2img"}  # the task of a row with this field


def read(
    path: str | Path, defaults: dict[str, Any] | None = None, word: Callable[[], str] | None = None
) -> tuple[list[Request], list[dict[str, Any]]]:
    """Returns (requests, errors): list of Request, and list of {"row", "error"}.

    defaults: settings for fields that a row omits.  A row ignores those that its task lacks or that need another field,
    as strength needs an image.
    word: () -> text, called for seeds of -1: the same word draws the same seeds at every reading; None draws new ones.
    Raises ValueError for an unreadable file, more than WHOLE pictures, and invalid defaults.
    """
    path = Path(path)
    requests, errors, names = [], [], set()
    defaults = _checked(defaults or {}, mine=True)
    word = word or functools.cache(lambda: secrets.token_hex(16))
    for number, row in enumerate(_rows(path), start=1):
        try:
            if isinstance(row, ValueError):
                raise row
            made = _requests(number, row, defaults, path.resolve().parent, word)
            taken = names & {one.name for one in made}
            if taken:
                raise ValueError(f"name={min(taken)!r}: another picture has this name")
            names |= {one.name for one in made}
            requests += made
            if len(requests) > WHOLE:
                raise _TooMany(f"{path}: row {number}: more than {WHOLE} pictures; split the list")
        except _TooMany:
            raise
        except (ValueError, OverflowError, RecursionError) as error:
            errors.append({"row": number, "error": str(error)})
    return requests, errors


class _TooMany(ValueError):
    """A list has more than WHOLE pictures."""


def _checked(row, mine=False):
    """Returns the fields of a row that are set, each a value of its type or a list of values.

    mine: the fields come from the command line, not from a list.
    """
    row = {name: value for name, value in row.items() if value not in (None, "") or name == "prompt"}
    for name in row:
        if name in FIRST and name not in KNOWN:
            now, more = FIRST[name]
            raise SettingError(
                name, UNSAID, f"{now}{more and f', which is {more} more' or ''}", "is called otherwise now"
            )
        if name not in KNOWN and name not in ("name", "task"):
            raise SettingError(name, UNSAID, nearest(name, ["prompt", *KNOWN, "name", "task"]), "no such field")
        if not mine and name in KNOWN and KNOWN[name].about.mine:
            raise SettingError(name, UNSAID, f"--{name.replace('_', '-')} of the command line", "is not for rows")
    made = {name: _several(KNOWN[name], value) for name, value in row.items() if name in KNOWN}
    return made | {name: row[name] for name in ("name", "task") if name in row}


def _requests(number, row, defaults, folder, word):
    row = _checked(row)
    task = row.pop("task", None) or next((task for name, task in WITH.items() if row.get(name)), "text2img")
    if task not in TASKS or task == "interpolate":
        raise SettingError("task", task, f"one of {', '.join(name for name in TASKS if name != 'interpolate')}")
    known = fields(TASKS[task])
    for name in row.keys() - known.keys() - {"name"}:
        raise SettingError(name, row[name], f"together with {KNOWN[name].about.needs or 'another task'}")
    usual = {name: value for name, value in defaults.items() if name in known and name not in row}
    for name in [name for name in usual if known[name].about.needs not in (*row, *usual, "")]:
        del usual[name]
    row |= {"seed": number} | usual if "seed" not in row else usual
    row |= {name: _drawn(row[name], f"{number} {name}", word) for name in SEEDED if name in row}
    rows = expand(row)
    made = []
    for index, settings in enumerate(rows):
        name = settings.pop("name", None) or f"{number:06d}"
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w. -]*", name):
            raise ValueError(f"name={shown(name)}: expected letters, digits, '.', '_', '-' and spaces")
        if name.rstrip(". ") != name or name.partition(".")[0].strip().upper() in RESERVED:
            raise ValueError(f"name={shown(name)}: expected a name that is valid on every file system")
        if len(name.encode()) > LONGEST:
            raise ValueError(f"name={shown(name)}: expected at most {LONGEST} bytes")
        one = make(TASKS[task], settings)
        check_named(one, defaults.get("adapter", ()))
        taken_apart(one)  # an unreadable adapter is this row's error
        made.append(Request(one, folder, f"{name}-{index:05d}" if len(rows) > 1 else name, number))
    return made


def expand(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns every combination of a row's fields that are lists; the first field varies slowest."""
    count = 1
    for value in row.values():
        count *= len(value) if isinstance(value, list) else 1
    if not 1 <= count <= MOST:
        raise ValueError(f"{count} pictures in one row; expected 1 to {MOST}")
    values = [value if isinstance(value, list) else [value] for value in row.values()]
    return [dict(zip(row, some, strict=True)) for some in itertools.product(*values)]


def _drawn(value, place, word):
    """Returns a seed or list of seeds, with 32 random bits for each -1; place: the field's place in the list."""
    if isinstance(value, list):
        return [_drawn(one, f"{place} {i}", word) for i, one in enumerate(value)]
    if value != -1:
        return value
    return int.from_bytes(hashlib.sha256(f"{word()} {place}".encode()).digest()[:4], "big")


def _several(one: Field, value: Any) -> Any:
    """Returns a field's checked value in its type, or a list of such values."""
    if one.kind is int and isinstance(value, str):
        span = re.fullmatch(r"(\d+)-(\d+)", value.strip())
        if span and max(map(len, span.groups())) < 20:
            first, last = map(int, span.groups())
            if last - first >= MOST:
                raise SettingError(one.name, value, f"at most {MOST} numbers")
            return list(range(first, last + 1))
    if one.kind is not str and isinstance(value, str) and "|" in value:
        value = value.split("|")
    if isinstance(value, list):
        if not value:
            raise SettingError(one.name, value, "at least one value")
        return [_one(one, part) for part in value]
    return _one(one, value)


def _one(one: Field, value: Any) -> Any:
    """Returns a value in its type; a name of several settings, such as "DPM++ 2M Karras", unchanged."""
    spelled = understood(TASKS["text2img"], {one.name: value}) if one.choices is not None else {}
    if len(spelled) > 1:
        return value
    return checked(one, () if one.several and value == "" else value, text=True)


def _rows(path: Path) -> Iterator[Any]:
    """Yields each row as a dict, or as the ValueError of its line."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in READERS:
        raise ValueError(f"{path}: expected a file ending in {', '.join('.' + name for name in READERS)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    yield from {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}[kind](path)


def _jsonl(path):
    with path.open("rb") as file:  # binary, so only \n ends a line: texts may contain Unicode line ends
        for number, line in enumerate(file):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            if line.strip():
                yield _object(line)


def _object(line):
    """Returns the JSON object of a line, or a ValueError that names its fault."""
    said = shown(line[:240].decode("utf-8", "replace").strip())
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return ValueError(f"{said}: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return ValueError(f"{said}: byte {error.start + 1} is not UTF-8")
    except RecursionError:
        return ValueError(f"{said}: nested too deep")
    except ValueError:  # Python's limit on the digits of an int
        return ValueError(f"{said}: a number has too many digits")
    return row if isinstance(row, dict) else ValueError(f"{said}: expected an object")


def _csv(path):
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.DictReader(file)
        try:
            rows.fieldnames  # noqa: B018 reads the header
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from None
        while True:
            try:
                row = next(rows)
                "".join(cell for cell in row.values() if isinstance(cell, str)).encode()
            except StopIteration:
                return
            except UnicodeEncodeError:
                row = ValueError(f"line {rows.line_num}: not UTF-8")
            except csv.Error as error:
                row = ValueError(f"line {rows.line_num}: {error}")
            if isinstance(row, dict) and None in row:
                row = ValueError(f"more cells than the header's {len(row) - 1}")
            yield row


def _parquet(path):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow; pip install pyarrow, or give .jsonl or .csv") from error
    with named(path):
        table = parquet.read_table(path)
    for batch in table.to_batches(max_chunksize=1000):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):  # for text that is not UTF-8 and times outside Python's range
            rows = [_arrow_row(batch.slice(i, 1)) for i in range(len(batch))]
        yield from rows


def _arrow_row(one):
    try:
        return one.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return ValueError(str(error))
