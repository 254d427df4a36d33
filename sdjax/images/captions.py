"""What is said of the pictures of a folder: beside them, in metadata.jsonl, and by the names of folders.

    words = of(root, files, pictures)           # {path: caption}
    of_folder(Path("10_sks dog"))               # (10, "sks dog"): ten times an epoch, and a caption for want of one

NAME.txt or NAME.caption holds the caption of NAME.png.  In metadata.jsonl a line {"file_name": "a.png", "text": "..."}
names a picture as seen from that file's folder; where several name one, the nearest counts.

Sources: Hugging Face's datasets, ImageFolder (metadata.jsonl); kohya's sd-scripts (.caption, REPEATS_WORDS).
"""

import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

METADATA = "metadata.jsonl"
ENDINGS = (".txt", ".caption")  # the first goes before the second
MAX_BYTES = 1 << 16
NAMED = re.compile(r"(\d{1,4})_(.*)")  # longer numbers are dates


def of(root: Path, files: Iterable[Path], pictures: Iterable[Path], whole: bool = True) -> dict[Path, str]:
    """Returns {picture: caption} of the pictures that have one; files: all of the folder `root`, in order.

    whole: whether these are all pictures of the folder, so that metadata.jsonl must name no other.
    Raises ValueError for a text that is no UTF-8 or too long, a line that says nothing, and one without a picture.
    """
    known, found = set(pictures), {}
    for path in sorted((p for p in files if p.name == METADATA), key=lambda p: len(p.parts)):  # the nearest last
        named = {path.parent / name: (name, text) for name, text in _metadata(path)}
        unknown = [name for picture, (name, _) in named.items() if picture not in known]
        if whole and unknown:
            raise ValueError(f"{path}: {len(unknown)} entries without a picture, such as {min(unknown)!r}")
        found |= {picture: text for picture, (_, text) in named.items() if picture in known}
    texts = beside(files, ENDINGS)
    return found | {p: _text(texts[p.parent, p.stem]) for p in known if (p.parent, p.stem) in texts}


def beside(files: Iterable[Path], endings: tuple[str, ...]) -> dict[tuple[Path, str], Path]:
    """Returns {(folder, NAME): NAME + ending} of the files that end so, in letters of any case.

    Of several with a name the one of the first ending counts.
    """
    found = {}
    for ending in reversed(endings):
        named = [path for path in files if path.name.lower().endswith(ending)]
        found |= {(path.parent, path.name[: -len(ending)]): path for path in named}
    return found


def of_folder(folder: PurePath) -> tuple[int, str]:
    """Returns (times an epoch, words) of a name such as "10_sks dog", the folder's or of one around it; else (1, "").

    Raises ValueError for 0 times.
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
    """Yields (name as seen from its folder, caption) of each line of a metadata.jsonl."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line) if len(line) <= MAX_BYTES else {}
                said = posixpath.normpath(row["file_name"]), " ".join(row["text"].split())
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ValueError(f'{path}, line {number}: expected {{"file_name": "...", "text": "..."}}') from None
            yield said
