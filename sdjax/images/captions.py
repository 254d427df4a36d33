"""Captions and repeats of an image folder, from files next to pictures, metadata files and folder names.

    words = of(root, files, pictures)           # {path: caption}
    of_folder(Path("10_sks dog"))               # (10, "sks dog"): ten times an epoch; the words are a fallback caption

NAME.txt or NAME.caption holds the caption of NAME.png.  A line {"file_name": "a.png", "text": "..."} in metadata.jsonl
captions the picture at that path relative to the metadata file.  If several lines name a picture, the metadata file
nearest to it wins.  metadata.csv and metadata.parquet have the same two columns.

Sources: Hugging Face's datasets, ImageFolder (metadata.*); kohya's sd-scripts (.caption, REPEATS_WORDS).
"""

import csv
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
ENDINGS = (".txt", ".caption")  # the first takes precedence
MAX_BYTES = 1 << 16
NAMED = re.compile(r"(\d{1,4})_(.*)")  # longer numbers are dates


def of(root: Path, files: Iterable[Path], pictures: Iterable[Path], whole: bool = True) -> dict[Path, str]:
    """Returns {picture: caption} for the pictures with a caption.

    files: all files of the folder `root`, sorted.
    whole: whether `pictures` are all pictures of the folder; if so, metadata.* may name no other file.
    Raises ValueError for a caption that is not UTF-8 or too long, a metadata line without both fields or without its
    picture, and two metadata files in one folder.
    """
    known, found = set(pictures), {}
    told = sorted((p for p in files if p.name in METADATA), key=lambda p: len(p.parts))  # the nearest last
    for path in told:
        if others := [other for other in told if other.parent == path.parent and other != path]:
            raise ValueError(f"{path}: {others[0].name} lies beside it; expected one of them")
        named = {path.parent / name: (name, text) for name, text in _metadata(path)}
        unknown = [name for picture, (name, _) in named.items() if picture not in known]
        if whole and unknown:
            raise ValueError(f"{path}: {len(unknown)} entries without a picture, such as {min(unknown)!r}")
        found |= {picture: text for picture, (_, text) in named.items() if picture in known}
    texts = beside(files, ENDINGS)
    return found | {p: _text(texts[p.parent, p.stem]) for p in known if (p.parent, p.stem) in texts}


def beside(files: Iterable[Path], endings: tuple[str, ...]) -> dict[tuple[Path, str], Path]:
    """Returns {(folder, NAME): path} of the files whose names are NAME + one of these endings, in any case.

    If a NAME has files with several endings, the first ending wins.
    """
    found = {}
    for ending in reversed(endings):
        named = [path for path in files if path.name.lower().endswith(ending)]
        found |= {(path.parent, path.name[: -len(ending)]): path for path in named}
    return found


def of_folder(folder: PurePath) -> tuple[int, str]:
    """Returns (repeats per epoch, words) from the nearest folder name like "10_sks dog"; (1, "") without one.

    Raises ValueError for 0 repeats.
    """
    for name in reversed(folder.parts):
        if said := NAMED.fullmatch(name):
            times = int(said[1])
            if times == 0:
                raise ValueError(f"folder {name!r}: 0 times an epoch; expected 1_ or more, or another name")
            return times, " ".join(said[2].split())
    return 1, ""


def _text(path):
    """Returns a caption file's words on one line."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: longer than {MAX_BYTES} bytes; expected one caption")
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


def _metadata(path) -> Iterator[tuple[str, str]]:
    """Yields (name relative to its folder, caption) of each row of a metadata file."""
    for place, row in {".jsonl": _lines, ".csv": _cells, ".parquet": _columns}[path.suffix](path):
        try:
            said = posixpath.normpath(row["file_name"]), " ".join(row["text"].split())
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f'{path}, {place}: expected {{"file_name": "...", "text": "..."}}') from None
        yield said


def _lines(path) -> Iterator[tuple[str, Any]]:
    """Yields ("line 3", the line's JSON value, or None if it is invalid)."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line) if len(line) <= MAX_BYTES else None
                except (ValueError, RecursionError):
                    yield f"line {number}", None


def _cells(path) -> Iterator[tuple[str, Any]]:
    """Yields ("line 3", {column: cell}, or None for a line that is not UTF-8 or not CSV)."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError):
                row = None
            yield f"line {rows.line_num}", row
            if row is None:
                return


def _columns(path) -> Iterator[tuple[str, Any]]:
    """Yields ("row 3", {column: value})."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet needs pyarrow; pip install pyarrow, or write metadata.csv") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's, for a damaged file
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
