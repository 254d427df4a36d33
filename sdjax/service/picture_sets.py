"""A set of training pictures: listing, captions, masks, rotating, cropping, removing.

uploads.keep_set(place, key, [("cat.png", data)])
for one in listed(place, key): print(one.name, one.caption, one.masked)
turn(place, key, "cat.png")
"""

import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from sdjax.formats.storage import files
from sdjax.images import reading
from sdjax.service import uploads
from sdjax.service.place import Place
from sdjax.settings import SettingError

NAME = re.compile(r"[\w-]{1,100}\.(png|jpg|webp)")


@dataclass(frozen=True)
class Shown:
    """A picture of a set; state: the file's time of change in ns."""

    name: str
    caption: str
    masked: bool
    state: int


def listed(place: Place, key: str) -> list[Shown]:
    """Returns the pictures of a set by name, [] for an unknown set."""
    folder = place.set(key)
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir(), key=lambda one: one.stem):
        if NAME.fullmatch(path.name):
            text = path.with_suffix(".txt")
            caption = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else ""
            masked = path.with_name(f"{path.stem}{uploads.MASK}").is_file()
            found.append(Shown(path.name, caption.strip(), masked, path.stat().st_mtime_ns))
    return found


def picture(place: Place, key: str, name: str) -> Path:
    """Returns the file of a picture in a set.  Raises SettingError for an unknown picture."""
    if NAME.fullmatch(name):
        path = place.set(key) / name
        if path.is_file():
            return path
    raise SettingError("picture", name, "a picture in the set")


def describe(place: Place, key: str, name: str, caption: str) -> None:
    """Writes the caption of a picture; "" removes it."""
    text = picture(place, key, name).with_suffix(".txt")
    said = " ".join(caption.split())[: uploads.MOST_CAPTION // 4]
    if not said:
        text.unlink(missing_ok=True)
        return
    with files.new_file(text) as temporary:
        temporary.write_text(said, encoding="utf-8")


def turn(place: Place, key: str, name: str) -> None:
    """Turns a picture and its mask clockwise by 90 degrees."""
    path = picture(place, key, name)
    mask = path.with_name(f"{path.stem}{uploads.MASK}")
    _write(path, np.rot90(reading.picture(path), -1))
    if mask.is_file():
        _write(mask, np.rot90(reading.mask(mask), -1))


def redraw(place: Place, key: str, name: str, cut: bytes | None, painted: bytes | None) -> None:
    """Replaces a picture by an edited one.

    cut: the new pixels.  painted: a layer of the editor; training learns only the painted part.  None: unchanged.
    Raises SettingError for data that is not a picture.
    """
    path = picture(place, key, name)
    mask = path.with_name(f"{path.stem}{uploads.MASK}")
    if cut is not None:
        uploads.check(cut, "picture")
        with Image.open(BytesIO(cut), formats=reading.FORMATS) as image:
            pixels = np.asarray(_flat(image))
        _write(path, pixels)
        if mask.is_file() and reading.mask(mask).shape != pixels.shape[:2]:
            mask.unlink()  # it fitted the picture before the cut
    kept = uploads.painted(place, painted) if painted is not None else None
    if kept is not None:
        with Image.open(path) as image, Image.open(place.upload(kept)) as layer:
            size = _upright(image.size, image)
            found = layer.convert("L").resize(size, Image.Resampling.NEAREST)
        _write(mask, np.asarray(found))


def clean(place: Place, key: str, name: str) -> None:
    """Removes the mask of a picture."""
    path = picture(place, key, name)
    path.with_name(f"{path.stem}{uploads.MASK}").unlink(missing_ok=True)


def remove(place: Place, key: str, name: str) -> None:
    """Removes a picture, its caption and its mask from a set."""
    path = picture(place, key, name)
    for one in (path.with_suffix(".txt"), path.with_name(f"{path.stem}{uploads.MASK}"), path):
        one.unlink(missing_ok=True)


def copied(place: Place, key: str, other: str) -> None:
    """Copies a set to another key, so that later edits do not change an earlier run's set."""
    there = [(path.name, path.read_bytes()) for path in sorted(place.set(key).iterdir()) if path.is_file()]
    folder = place.set(other)
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, data in there:
        with files.new_file(folder / name) as temporary:
            temporary.write_bytes(data)


def _upright(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    return (size[1], size[0]) if image.getexif().get(0x0112) in (5, 6, 7, 8) else size


def _flat(image: Image.Image) -> Image.Image:
    """Returns a picture in RGB on white."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    whole = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")


def _write(path: Path, pixels: np.ndarray) -> None:
    """Writes a picture in the format of its suffix."""
    kind = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[path.suffix.lstrip(".")]
    with files.new_file(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, kind, quality=95)
