"""Uploaded pictures, each stored once under the hash of its bytes.

name = keep(place, data)            # "0f3c….png", what requests call it
"""

import base64
import binascii
import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from sdjax import conditions
from sdjax.formats.storage import files
from sdjax.images import reading, writing
from sdjax.service.place import Place
from sdjax.settings import SettingError

MOST_BYTES = 32 << 20  # of one picture
MOST_PIXELS = 4096 * 4096
MOST_KEPT = 4000  # pictures; of more the oldest that no job waits for go
MOST_FILES = 2000  # pictures of one set
MOST_SET = 1 << 30  # bytes of all pictures of one set, unpacked
ENDINGS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
PREFIX = re.compile(r"data:image/[\w.+-]{1,40};base64,")
CAPTIONS = (".txt", ".caption")
MOST_CAPTION = 1 << 16  # bytes


def decoded(text: object, setting: str = "image") -> bytes:
    """Returns the bytes of base64, raw or as a data URL; nothing else names a picture.

    Raises SettingError, of the setting, for anything else; an address of a picture is not fetched.
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
    """Keeps a picture's bytes and returns its name.

    Raises SettingError, of the setting, for what is no picture, too large, or cannot be decoded.
    """
    kind = check(data, setting)
    path = place.upload(f"{hashlib.sha256(data).hexdigest()[:32]}.{kind}")
    if path.is_file():
        os.utime(path)
        return path.name
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=f".{kind}", dir=path.parent)  # several may send the same
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        reading.picture(name)
        os.replace(name, path)
    except (ValueError, OSError) as error:
        os.unlink(name)
        said = str(error).splitlines()[0].removeprefix(f"{name}: ")
        raise SettingError(setting, f"{len(data)} bytes", "a picture", said) from None
    return path.name


def check(data: bytes, setting: str) -> str:
    """Returns the ending of a picture's kind, of which only the header is read.

    Raises SettingError, of the setting, for what is no picture, or too large.
    """
    size = f"{len(data)} bytes"
    if len(data) > MOST_BYTES:
        raise SettingError(setting, size, f"a picture of at most {MOST_BYTES >> 20} MB")
    try:
        with Image.open(BytesIO(data), formats=reading.FORMATS) as image:
            kind, (width, height) = image.format or "", image.size
    except Exception:  # Pillow raises anything on what is no picture
        raise SettingError(setting, size, "a PNG, JPEG or WebP picture") from None
    if width * height > MOST_PIXELS:
        raise SettingError(setting, f"{width} x {height}", f"a picture of at most {MOST_PIXELS} pixels")
    return ENDINGS[kind]


def inverted(place: Place, name: str) -> str:
    """Returns the name of a mask that is white where another one is black."""
    picture = 255 - reading.mask(place.upload(name))
    return keep(place, writing.png(picture.astype(np.uint8)), "mask")


def painted(place: Place, data: bytes) -> str | None:
    """Returns the name of a mask that is white where a layer of an editor, a PNG, is painted; None where it is nowhere.

    Raises SettingError for what is no picture.
    """
    check(data, "mask")
    with Image.open(BytesIO(data), formats=reading.FORMATS) as image:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    if not alpha.any():
        return None
    return keep(place, writing.png(np.where(alpha > 127, 255, 0).astype(np.uint8)), "mask")


def prepared(place: Place, name: str, way: str) -> str:
    """Returns the name of what a ControlNet sees of an upload, prepared by a condition; "" leaves it as it is.

    Raises SettingError for what is no condition, ValueError where a picture holds no such thing.
    """
    if not way:
        return name
    made = conditions.of(way, public=True).make(reading.picture(place.upload(name)))
    return keep(place, writing.png(made), "control_image")


def pruned(place: Place, needed: Iterable[str], most: int = MOST_KEPT) -> int:
    """Removes the uploads that were used longest ago, beyond `most`, but those whose names stand in `needed`.

    Returns how many went.
    """
    there = sorted((place.root / "uploads").glob("[0-9a-f]*"), key=lambda path: -path.stat().st_mtime)
    if len(there) <= most:
        return 0
    text = "\n".join(needed)
    gone = [path for path in there[most:] if path.name not in text]
    for path in gone:
        path.unlink(missing_ok=True)
    return len(gone)


# ---- sets of pictures to train on ------------------------------------------------------------------


def keep_set(place: Place, key: str, given: Iterable[tuple[str, bytes]]) -> int:
    """Keeps pictures, and captions beside them, in the folder of a set; returns how many pictures it has.

    given: (name, bytes) of .png .jpg .webp, .txt .caption, and .zip archives of these.  Of a name its letters, digits,
    '_' and '-' stay, and never a folder.  Raises SettingError for what is none of these, and for too many.
    """
    folder = place.set(key)
    folder.mkdir(mode=0o700, exist_ok=True)
    total = sum(path.stat().st_size for path in folder.iterdir())
    for name, data in _unpacked(given):
        total += len(data)
        if total > MOST_SET or len(list(folder.iterdir())) >= 2 * MOST_FILES:
            raise SettingError("files", name, f"at most {MOST_FILES} pictures and {MOST_SET >> 30} GB a set")
        stem, suffix = safe(Path(name).stem), Path(name).suffix.lower()
        if suffix in CAPTIONS:
            if len(data) > MOST_CAPTION:
                raise SettingError("files", name, f"a caption of at most {MOST_CAPTION >> 10} KB")
            ending = "txt"  # which the set's list shows and removes
        else:
            ending = check(data, "files")
        with files.new_file(folder / f"{stem}.{ending}") as temporary:
            temporary.write_bytes(data)
    return sum(path.suffix.lstrip(".") in ENDINGS.values() for path in folder.iterdir())


def safe(stem: str) -> str:
    """Returns a name that is a file's anywhere."""
    stem = re.sub(r"[^\w-]+", "_", stem, flags=re.ASCII).strip("_")[:80]
    return stem or "picture"


def _unpacked(given: Iterable[tuple[str, bytes]]) -> Iterable[tuple[str, bytes]]:
    for name, data in given:
        if Path(name).suffix.lower() == ".zip":
            yield from unzipped(name, data)
        else:
            yield name, data


def unzipped(name: str, data: bytes) -> Iterable[tuple[str, bytes]]:
    """Yields (name, bytes) of the files of an archive, of which no more is unpacked than is allowed.

    Raises SettingError for what is no archive, and for one with too many or too large files.
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
                    found = file.read(min(MOST_BYTES, left) + 1)  # what a directory says need not be so
                left -= len(found)
                if len(found) > MOST_BYTES or left < 0:
                    raise SettingError("files", one.filename, f"a picture of at most {MOST_BYTES >> 20} MB")
                yield one.filename, found
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError("files", name, "a zip archive", str(error).splitlines()[0] if str(error) else "") from None
