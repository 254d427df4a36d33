"""Uploaded pictures, each stored once under the hash of its bytes.

name = keep(place, data)            # "0f3c….png", what requests call it
"""

import base64
import binascii
import contextlib
import hashlib
import itertools
import os
import re
import tempfile
import time
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax import conditions
from sdjax.formats.storage import files
from sdjax.images import reading, writing
from sdjax.service.place import Place
from sdjax.settings import SettingError

MOST_BYTES = 32 << 20  # of one picture
MOST_PIXELS = 4096 * 4096
MOST_KEPT = 4000  # pictures; above this, the oldest that no job needs are removed
MOST_FILES = 2000  # pictures in a set
MOST_SET = 1 << 30  # bytes of all pictures in a set, unpacked
ENDINGS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
PREFIX = re.compile(r"data:image/[\w.+-]{1,40};base64,")
CAPTIONS = (".txt", ".caption")
CAPTION, MASK = BESIDE = CAPTIONS[0], reading.MASK_ENDINGS[0]  # what they are called in a set
MOST_CAPTION = 1 << 16  # bytes
MOST_NAME = 200  # bytes of a stem in UTF-8; file systems take 255 with its number and ending
RESERVED = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9¹²³]", re.IGNORECASE)  # devices of Windows


def decoded(text: object, setting: str = "image") -> bytes:
    """Returns the bytes of base64 text, raw or as a data URL.

    Raises SettingError for `setting` for anything else: sdjax fetches no URLs.
    """
    if not isinstance(text, str):
        raise SettingError(setting, type(text).__name__, "a picture in base64")
    match = PREFIX.match(text)
    plain = text[match.end() :] if match else text
    if len(plain) > MOST_BYTES * 4 // 3 + 4:
        raise SettingError(setting, f"{len(plain)} letters", f"a picture of at most {MOST_BYTES >> 20} MB")
    try:
        return base64.b64decode("".join(plain.split()), validate=True)
    except (binascii.Error, ValueError):
        raise SettingError(setting, text[:40], "a picture in base64") from None


def keep(place: Place, data: bytes, setting: str = "image") -> str:
    """Stores a picture's bytes and returns its name.

    Raises SettingError for `setting` for data that is not a picture, is too large, or is damaged.
    """
    kind = check(data, setting)
    path = place.upload(f"{hashlib.sha256(data).hexdigest()[:32]}.{kind}")
    if path.is_file():
        _used(path)
        return path.name
    descriptor, name = tempfile.mkstemp(
        prefix=".", suffix=f".{kind}", dir=path.parent
    )  # clients may send the same picture
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        reading.picture(name)
        os.replace(name, path)
    except (ValueError, OSError) as error:
        os.unlink(name)
        said = str(error).splitlines()[0].removeprefix(f"{name}: ")
        raise SettingError(setting, f"{len(data)} bytes", "a picture", said) from None
    _used(path)
    return path.name


def check(data: bytes, setting: str) -> str:
    """Returns the suffix of a picture's format; reads the header only.

    Raises SettingError for `setting` for data that is not a picture or is too large.
    """
    size = f"{len(data)} bytes"
    if len(data) > MOST_BYTES:
        raise SettingError(setting, size, f"a picture of at most {MOST_BYTES >> 20} MB")
    try:
        with Image.open(BytesIO(data), formats=reading.FORMATS) as image:
            kind, (width, height) = image.format or "", image.size
    except Exception:  # Pillow raises many kinds of errors
        raise SettingError(setting, size, "a PNG, JPEG or WebP picture") from None
    if width * height > MOST_PIXELS:
        raise SettingError(setting, f"{width} x {height}", f"a picture of at most {MOST_PIXELS} pixels")
    return ENDINGS[kind]


def inverted(place: Place, name: str) -> str:
    """Returns the name of the inverted mask."""
    picture = 255 - reading.mask(place.upload(name))
    return keep(place, writing.png(picture.astype(np.uint8)), "mask")


def _used(path: Path) -> None:
    """Gives an upload the newest time of all, although a clock that was set back says an older one."""
    times = _times(path.parent)
    times.pop(path, None)
    now = max(time.time_ns(), max(times.values(), default=0) + 1)
    os.utime(path, ns=(now, now))


def _times(folder: Path) -> dict[Path, int]:
    """Returns {upload: when it was used last, in nanoseconds}; others may remove some meanwhile."""
    found = {}
    for path in folder.glob("[0-9a-f]*"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime_ns
    return found


def painted(place: Place, data: bytes) -> str | None:
    """Returns the name of a mask, white where an editor's layer (a PNG) is painted; None for an empty layer.

    Raises SettingError for data that is not a picture.
    """
    check(data, "mask")
    with Image.open(BytesIO(data), formats=reading.FORMATS) as image:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    if not alpha.any():
        return None
    return keep(place, writing.png(np.where(alpha > 127, 255, 0).astype(np.uint8)), "mask")


def prepared(place: Place, name: str, way: str) -> str:
    """Returns the name of an upload's condition picture for a ControlNet; way: a condition, "" for the upload itself.

    Raises SettingError for an unknown condition, ValueError if it finds nothing in the picture.
    """
    if not way:
        return name
    made = conditions.of(way, public=True).make(reading.picture(place.upload(name)))
    return keep(place, writing.png(made), "control_image")


def pruned(place: Place, needed: Iterable[str], most: int = MOST_KEPT) -> int:
    """Removes the least recently used uploads above `most`, except those named in `needed`.

    Returns the number removed.
    """
    times = _times(place.root / "uploads")
    there = sorted(times, key=lambda path: -times[path])
    if len(there) <= most:
        return 0
    text = "\n".join(needed)
    gone = [path for path in there[most:] if path.name not in text]
    for path in gone:
        path.unlink(missing_ok=True)
    return len(gone)


# ---- sets of pictures to train on ------------------------------------------------------------------


def keep_set(place: Place, key: str, given: Iterable[tuple[str, bytes]]) -> int:
    """Adds pictures, captions and masks to the folder of a set; returns the number of pictures in it.

    given: (name, bytes) of .png .jpg .webp, .mask.png, .txt .caption, and .zip archives of these.  Names keep their
    letters, digits, '_' and '-', never a folder.  A picture whose name is taken gets another, and so do the caption and
    the mask given with it; without a picture they are for the one of that name in the set.
    Raises SettingError for other files and for too many, before it stores any.
    """
    folder, given = place.set(key), list(given)
    folder.mkdir(mode=0o700, exist_ok=True)
    names = _named(folder, _checked(folder, given))
    for (_, data), own in zip(_unpacked(given), names, strict=True):
        for name in own:
            with files.new_file(folder / name) as temporary:
                temporary.write_bytes(data)
    return sum(map(_is_picture, folder.iterdir()))


def _checked(folder: Path, given: Iterable[tuple[str, bytes]]) -> list[tuple[str, str]]:
    """Returns [(name, suffix in the set)] of the unpacked files; captions are .txt, so that the set can remove them."""
    there = list(folder.iterdir())
    found, total = [], sum(path.stat().st_size for path in there)
    for name, data in _unpacked(given):
        total += len(data)
        if total > MOST_SET or len(there) + len(found) >= 2 * MOST_FILES:
            raise SettingError("files", name, f"at most {MOST_FILES} pictures and {MOST_SET >> 30} GB a set")
        suffix = Path(name).suffix.lower()
        if suffix in CAPTIONS and len(data) > MOST_CAPTION:
            raise SettingError("files", name, f"a caption of at most {MOST_CAPTION >> 10} KB")
        kind = CAPTION if suffix in CAPTIONS else f".{check(data, 'files')}"
        found.append((name, MASK if _mask_ending(name) else kind))
    return found


def _named(folder: Path, given: list[tuple[str, str]]) -> list[list[str]]:
    """Returns the names in a set of each (name, suffix): of a caption or a mask, one for each of its pictures."""
    seen, sources = Counter(), []
    for name, _ in given:
        path, mask = Path(name), _mask_ending(name)
        sources.append((path.parent, path.name[: -len(mask)] if mask else path.stem, seen[name]))
        seen[name] += 1  # a name twice in one form: the first caption is for the first picture
    stems, anywhere = defaultdict[Any, list[str]](list), dict[str, str]()
    used = {path.stem.casefold() for path in folder.iterdir() if _is_picture(path)}
    names: list[list[str]] = [[] for _ in given]
    for i, (_, suffix) in enumerate(given):
        if suffix not in BESIDE:
            stem = _unused(safe(sources[i][1]), used)
            names[i] = [f"{stem}{suffix}"]
            stems[sources[i]].append(stem)
            anywhere.setdefault(sources[i][1], stem)
    for i, (_, suffix) in enumerate(given):
        stem = sources[i][1]
        names[i] = names[i] or [f"{one}{suffix}" for one in stems[sources[i]] or [anywhere.get(stem, safe(stem))]]
    return names


def _unused(stem: str, used: set[str]) -> str:
    """Returns a stem that is not in `used` and adds it; upper and lower case are one, as on some file systems."""
    numbered = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    found = next(one for one in numbered if one.casefold() not in used)
    used.add(found.casefold())
    return found


def _mask_ending(name: str) -> str:
    """Returns the ending of a mask's name, "" for another file."""
    return next((ending for ending in reading.MASK_ENDINGS if name.lower().endswith(ending)), "")


def _is_picture(path: Path) -> bool:
    return path.suffix.lstrip(".") in ENDINGS.values() and not _mask_ending(path.name)


def safe(stem: str) -> str:
    """Returns a name of letters and digits of any script, '_' and '-' that is valid on every file system."""
    stem = re.sub(r"[^\w-]+", "_", unicodedata.normalize("NFC", stem)).strip("_")[:80]
    stem = stem.encode()[:MOST_NAME].decode(errors="ignore") or "picture"
    return f"{stem}_" if RESERVED.fullmatch(stem) else stem


def _unpacked(given: Iterable[tuple[str, bytes]]) -> Iterable[tuple[str, bytes]]:
    for name, data in given:
        if Path(name).suffix.lower() == ".zip":
            yield from ((f"{name}/{inner}", found) for inner, found in unzipped(name, data))
        else:
            yield name, data


def unzipped(name: str, data: bytes) -> Iterable[tuple[str, bytes]]:
    """Yields (name, bytes) of the files in an archive; unpacks no more than the limits allow.

    Raises SettingError for data that is not an archive, and for too many or too large files.
    """
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            entries = [one for one in archive.infolist() if not one.is_dir()]
            if len(entries) > 2 * MOST_FILES or sum(one.file_size for one in entries) > MOST_SET:
                raise SettingError("files", name, f"an archive of at most {MOST_FILES} pictures and 1 GB")
            left = MOST_SET
            for one in entries:
                if one.flag_bits & 1 or one.file_size > MOST_BYTES:
                    raise SettingError("files", one.filename, f"a picture of at most {MOST_BYTES >> 20} MB")
                if Path(one.filename).name.startswith((".", "__MACOSX")) or "__MACOSX" in one.filename:
                    continue
                with archive.open(one) as file:
                    found = file.read(min(MOST_BYTES, left) + 1)  # the archive's directory may lie
                left -= len(found)
                if len(found) > MOST_BYTES or left < 0:
                    raise SettingError("files", one.filename, f"a picture of at most {MOST_BYTES >> 20} MB")
                yield one.filename, found
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError("files", name, "a zip archive", str(error).splitlines()[0] if str(error) else "") from None
