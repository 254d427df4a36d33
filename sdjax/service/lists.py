"""Lists of pictures to make: rows of JSONL, CSV or parquet, each with settings of its own.

    {"prompt": "a photo of a face", "seed": 7}
    {"prompt": ["a fox", "an owl"], "seed": "0-9", "guidance": [3, 7.5], "steps": 30}        # 2 x 10 x 2 pictures

    pictures, errors = read("jobs.jsonl", {"steps": 20})
    for settings, group in grouped(pictures): ...

A field that is a list, or a number or size written as "0-9" or "3|7.5", is a matrix: every combination becomes a
picture.  Each -1 of a row's seeds is a random number, for all pictures that it stands in.
A row that cannot be used is an error in `errors` and never the end of a run.
"""

import codecs
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import secrets
from pathlib import Path

from sdjax.text import grammars

NUMBERS = dict.fromkeys(("seed", "steps", "skip", "ensd", "variation_seed", "feather", "margin"), int)
NUMBERS |= {"guidance": float, "eta": float, "rescale": float, "strength": float}
NUMBERS |= dict.fromkeys(("guidance_start", "guidance_end", "threshold", "threshold_limit"), float)
NUMBERS |= dict.fromkeys(("churn", "churn_low", "churn_high", "churn_noise", "variation"), float)
TEXTS = ("prompt", "negative", "sampler", "schedule", "image", "mask", "resize")
TEXTS += ("grammar", "weighting", "noise_source", "adapters", "name")
FIELDS = (*TEXTS, *NUMBERS, "size")
DRAWN = ("seed", "variation_seed")  # of which -1 is a random one
# What may differ between pictures of one call.
SHARED = ("prompt", "negative", "seed", "variation_seed", "variation", "image", "mask", "adapters", "name")
NEEDED = dict.fromkeys(("strength", "resize", "mask"), ("image",))  # fields that mean nothing without others
NEEDED |= dict.fromkeys(("feather", "margin"), ("image", "mask"))
READERS = ("jsonl", "csv", "parquet")
MOST = 100_000  # pictures of one row: a typing error should not fill a disk
LONGEST = 200  # bytes of a name, to which endings come: file systems take 255
BITS = 64  # of whole numbers
BOUNDS = {"variation": (0, 1), "feather": (0, MOST), "margin": (0, MOST)}


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture to make: its name, unique in the list, the row it comes from, counted from 1, and its settings."""

    name: str
    row: int
    settings: dict


def read(path, defaults=None, word=None):
    """Returns (pictures, errors): list of Picture, and list of {"row", "error"}.

    defaults: settings for the fields that a row does not have; those that need others, as strength needs an image,
    are for the rows that have these.
    word: () -> text, asked where seeds are -1: the same word draws the same seeds at every reading; None draws anew.
    Raises ValueError when the file as a whole cannot be read, and for defaults that cannot be used.
    """
    pictures, errors, names = [], [], set()
    defaults = _checked(defaults or {})
    word = word or functools.cache(lambda: secrets.token_hex(16))
    for number, row in enumerate(_rows(Path(path)), start=1):
        try:
            if isinstance(row, ValueError):
                raise row
            made = _pictures(number, row, defaults, word)
            taken = names & {picture.name for picture in made}
            if taken:
                raise ValueError(f"name={min(taken)!r}: there is a picture of this name already")
            names |= {picture.name for picture in made}
            pictures += made
        except (ValueError, OverflowError, RecursionError) as error:
            errors.append({"row": number, "error": str(error)})
    return pictures, errors


def grouped(pictures, kind=lambda picture: None):
    """Yields (settings, pictures) for each set of settings that pictures share, in order of their first appearance.

    settings: all but SHARED; which of image and mask there are, which adapters are asked for, and kind(picture) is the
    same within a group.
    """
    groups = {}
    for picture in pictures:
        shared = {name: value for name, value in picture.settings.items() if name not in SHARED}
        kinds = tuple(name in picture.settings for name in ("image", "mask"))
        kinds = (*kinds, repr(prompt(picture.settings)[1]), repr(kind(picture)))
        groups.setdefault(json.dumps([shared, kinds], sort_keys=True), (shared, []))[1].append(picture)
    yield from groups.values()


def prompt(settings):
    """Returns (prompt without its adapters, the grammars.Wanted of prompt and settings) of a picture's settings."""
    rest, more = grammars.adapters(settings.get("adapters", ""))
    if rest.strip():
        raise ValueError(f"adapters={_shown(rest.strip())}: expected <lora:NAME:STRENGTH> or <hypernet:NAME:STRENGTH>")
    text, own = settings["prompt"], ()
    if settings.get("grammar") == "a1111":
        text, own = grammars.adapters(text)
    return text, own + more


def expand(row):
    """Returns the rows of a row whose fields may be lists, first field slowest."""
    values = [value if isinstance(value, list) else [value] for value in row.values()]
    return [dict(zip(row, some, strict=True)) for some in itertools.product(*values)]


def _checked(row):
    """Returns the fields of a row that say something, each a value in its type or a list of such."""
    unknown = [name for name in row if name not in FIELDS]
    if unknown:
        raise ValueError(f"{unknown[0]}: no such field; accepted are {', '.join(FIELDS)}")
    return {name: _several(name, value) for name, value in row.items() if value not in (None, "") or name == "prompt"}


def _pictures(number, row, defaults, word):
    row = _checked(row)
    there = row.keys() | defaults.keys()
    for name, needed in NEEDED.items():
        if name in row and not there.issuperset(needed):
            raise ValueError(f"{name}={_shown(row[name])}: expected in a row with {' and '.join(needed)}")
    row |= {name: x for name, x in defaults.items() if name not in row and there.issuperset(NEEDED.get(name, ()))}
    if "prompt" not in row:
        raise ValueError("prompt: missing")
    count = 1
    for value in row.values():
        count *= len(value) if isinstance(value, list) else 1
    if not 1 <= count <= MOST:
        raise ValueError(f"{count} pictures of one row: expected 1 to {MOST}")
    row |= {name: _drawn(row[name], f"{number} {name}", word) for name in DRAWN if name in row}
    rows = expand(row)
    stem = f"{number:06d}"
    made = []
    for index, settings in enumerate(rows):
        name = settings.pop("name", None) or stem
        if not re.fullmatch(r"[\w][\w. -]*", name):
            raise ValueError(f"name={_shown(name)}: expected letters, digits, '.', '_', '-' and spaces")
        if len(name.encode()) > LONGEST:
            raise ValueError(f"name={_shown(name)}: expected at most {LONGEST} bytes")
        prompt(settings)  # an adapter that cannot be read is this row's error
        made.append(Picture(f"{name}-{index:05d}" if len(rows) > 1 else name, number, settings))
    return made


def _drawn(value, place, word):
    """Returns a seed, or a list of such, with 32 random bits in place of each -1; place: of the field in the list."""
    if isinstance(value, list):
        return [_drawn(one, f"{place} {i}", word) for i, one in enumerate(value)]
    if value != -1:
        return value
    return int.from_bytes(hashlib.sha256(f"{word()} {place}".encode()).digest()[:4], "big")


def _several(name, value):
    """Returns a field's value checked and in its type, or a list of such."""
    if name in NUMBERS and isinstance(value, str):
        span = re.fullmatch(r"(\d+)-(\d+)", value.strip()) if NUMBERS[name] is int else None
        if span:
            first, last = map(int, span.groups())
            if last - first >= MOST:
                raise ValueError(f"{name}={_shown(value)}: expected at most {MOST} numbers")
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
        return _number(name, value, NUMBERS[name])
    if name == "size":
        return _size(value)
    if name in TEXTS and not isinstance(value, str):
        raise ValueError(f"{name}={_shown(value)}: expected a text")
    return value


def _number(name, value, kind):
    """Returns a number of a kind, int or float; infinity is one for the highest sigma only."""
    try:
        number = kind(value)
        endless = kind is float and not math.isfinite(number) and (name != "churn_high" or number != math.inf)
        usable = not isinstance(value, bool) and not endless
    except (TypeError, ValueError, OverflowError):
        number, usable = None, False
    if not usable or isinstance(value, float) and number != value:
        raise ValueError(f"{name}={_shown(value)}: expected {'a whole number' if kind is int else 'a number'}")
    if kind is int and number.bit_length() > BITS:
        raise ValueError(f"{name}={_shown(value)}: expected a number of at most {BITS} bits")
    low, high = BOUNDS.get(name, (-math.inf, math.inf))
    if not low <= number <= high:
        raise ValueError(f"{name}={_shown(value)}: expected {low} to {high}")
    return number


def _shown(value):
    """Returns a value as errors show it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _size(value):
    """Returns pixels of 64 and "64", (height, width) of "WIDTHxHEIGHT"."""
    try:
        sides = [int(part) for part in str(value).lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1 or max(sides) > MOST:
        raise ValueError(f"size={_shown(value)}: expected pixels, or WIDTHxHEIGHT such as 768x512")
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
    with path.open("rb") as file:  # whose lines end at \n alone: a text may hold other letters that end lines
        for number, line in enumerate(file):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            if line.strip():
                yield _object(line)


def _object(line):
    """Returns the object of a line of JSON, or the ValueError that says why there is none."""
    shown = _shown(line[:240].decode("utf-8", "replace").strip())
    try:
        row = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return ValueError(f"{shown}: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return ValueError(f"{shown}: byte {error.start + 1} is not UTF-8")
    except RecursionError:
        return ValueError(f"{shown}: nested too deep")
    except ValueError:  # of Python's int, for thousands of digits
        return ValueError(f"{shown}: a number has too many digits")
    return row if isinstance(row, dict) else ValueError(f"{shown}: expected an object")


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
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow; pip install pyarrow, or give .jsonl or .csv") from error
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    for batch in table.to_batches(max_chunksize=1000):
        try:
            rows = batch.to_pylist()
        except ValueError:  # of text that is not UTF-8
            rows = [_arrow_row(batch.slice(i, 1)) for i in range(len(batch))]
        yield from rows


def _arrow_row(one):
    try:
        return one.to_pylist()[0]
    except ValueError as error:
        return ValueError(str(error))
