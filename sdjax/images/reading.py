"""Pictures on disk: finding them with their captions and masks, decoding them safely, cutting them square.

    items = find("photos/cat")
    picture, mask = decode(items[0], size=512, masked=True)         # PIL images, upright
    square(picture, 512, place=(0.5, 0.5), flip=False)              # uint8 [512 512 3]

A caption is the text of `name.txt` or of metadata.jsonl, a line {"file_name": "name.jpg", "text": "..."} per picture;
a mask is `name.mask.png`, `name-masklabel.png` or the picture's own alpha channel.  Paths come from listing the
folder; a file's text is only ever looked up among them.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MASK_ENDINGS = (".mask.png", "-masklabel.png")  # the second as OneTrainer writes it
METADATA = "metadata.jsonl"  # as Hugging Face's image folders
MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB at 3 bytes a pixel
MIN_SIDE = 16
MAX_CAPTION_BYTES = 1 << 16
ACCEPTED = "expected .jpg .png .webp"
BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error)  # what Pillow raises on damaged files


@dataclass(frozen=True)
class Item:
    """One picture: its path, its caption ("" for none), its mask's path or None, its subject (the sub-folder)."""

    path: Path
    caption: str = ""
    mask: Path | None = None
    subject: str = ""


def find(path):
    """Returns the Items of a folder and its sub-folders in the order of their names, or of one picture.

    Raises ValueError for a path that does not exist or holds no pictures, and for captions that cannot be read.
    """
    root = Path(path)
    if root.is_file():
        return (_item(root, root.parent, {}),)
    if not root.is_dir():
        raise ValueError(f"data.path={str(path)!r}: no such file or folder")
    paths = [p for p in sorted(root.rglob("*"), key=lambda p: p.relative_to(root).as_posix()) if _is_picture(p, root)]
    if not paths:
        raise ValueError(f"data.path={str(path)!r}: no images; {ACCEPTED}")
    captions = _metadata(root)
    items = tuple(_item(p, root, captions) for p in paths)
    unknown = captions.keys() - {p.relative_to(root).as_posix() for p in paths}
    if unknown:
        raise ValueError(f"{root / METADATA}: {len(unknown)} entries without a picture, such as {min(unknown)!r}")
    return items


def decode(item, size, masked=False):
    """Returns (picture, mask): an upright RGB image over white and, if `masked`, an "L" image of its size, else None.

    Pictures far larger than `size` pixels on the short side are averaged down by whole numbers, to at least twice it.
    Without a mask file and an alpha channel the mask is white.
    Raises ValueError naming the file: no image, too large, smaller than 16 pixels, cut short, a mask of another size
    or an empty one.
    """
    image, full = _upright(item.path, size)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    picture = image.convert("RGB")
    if alpha:
        picture = Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
    factor = max(1, min(picture.size) // (2 * size))
    mask = None
    if masked:
        mask = _mask(item.mask, full) if item.mask else alpha or Image.new("L", picture.size, 255)
        if mask.getextrema()[1] == 0:
            raise ValueError(f"{item.mask or item.path}: the mask is empty; nothing of the picture would be learned")
    picture = picture.reduce(factor) if factor > 1 else picture
    return picture, mask.resize(picture.size, Image.Resampling.BOX) if mask else None


def has_mask(item):
    """Returns whether a picture brings a mask: a file of its own, or an alpha channel (only the header is read)."""
    if item.mask:
        return True
    with _open(item.path) as image:
        return image.has_transparency_data


def square(image, size, place=(0.5, 0.5), flip=False):
    """Returns the largest square of an image as uint8 [size size 3], or [size size] of a mask.

    place: where the square lies in what it leaves over, (x, y) from 0 (left, top) to 1; on whole pixels.
    """
    width, height = image.size
    side = min(width, height)
    left, top = int(place[0] * (width - side) + 0.5), int(place[1] * (height - side) + 0.5)
    smooth = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    cut = np.asarray(image.resize((size, size), smooth, box=(left, top, left + side, top + side)))
    return np.ascontiguousarray(cut[:, ::-1]) if flip else cut


def subject(path, size):
    """Returns the middle square of the picture in a file, upright and over white, uint8 [size size 3].

    Raises ValueError naming the file when it is no picture, see decode.
    """
    return square(decode(find(path)[0], size)[0], size)


def digest(items):
    """Returns the first 16 hex digits of a SHA-256 over the pictures' bytes in order: which pictures these are."""
    total = hashlib.sha256()
    for item in items:
        with item.path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def _is_picture(path, root):
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and not path.name.endswith(MASK_ENDINGS) and path.is_file()


def _item(path, root, captions):
    """Returns the Item of a picture; its own text file goes before the folder's metadata."""
    beside = path.with_suffix(".txt")
    caption = _text(beside) if beside.is_file() else captions.get(path.relative_to(root).as_posix(), "")
    masks = [path.with_name(path.stem + ending) for ending in MASK_ENDINGS]
    subject = path.parent.relative_to(root).as_posix()
    return Item(path, caption, next((m for m in masks if m.is_file()), None), "" if subject == "." else subject)


def _text(path):
    """Returns a caption file's words on one line."""
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise ValueError(f"{path}: longer than {MAX_CAPTION_BYTES} bytes; expected one caption")
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


def _metadata(root):
    """Returns {relative name: caption} of a folder's metadata.jsonl, {} where there is none."""
    path, found = root / METADATA, {}
    if not path.is_file():
        return found
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_CAPTION_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line) if len(line) <= MAX_CAPTION_BYTES else None
                name, text = row["file_name"], row["text"]
                found[name] = " ".join(text.split())
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ValueError(f'{path}, line {number}: expected {{"file_name": "...", "text": "..."}}') from None
    return found


def _open(path):
    """Returns a PIL image of which only the header is read, its size checked; the caller closes it."""
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: more than {MAX_PIXELS} pixels; make it smaller") from None
    except BROKEN:
        raise ValueError(f"{path}: not an image; {ACCEPTED}") from None
    width, height = image.size
    if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE:
        image.close()
        wanted = (
            f"at most {MAX_PIXELS} pixels" if min(width, height) >= MIN_SIDE else f"at least {MIN_SIDE} on each side"
        )
        raise ValueError(f"{path}: {width} x {height} pixels; expected {wanted}")
    return image


def _upright(path, size=None):
    """Returns (image, (width, height) of the whole picture), turned as EXIF says; 16-bit grey keeps its upper bits.

    A JPEG much larger than `size` is decoded at 1/2, 1/4 or 1/8, to at least twice `size` on its short side.
    """
    with _open(path) as image:
        full = image.size
        try:
            if size and image.format == "JPEG":
                image.draft(None, (2 * size, 2 * size))
            image.load()
            sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            upright = ImageOps.exif_transpose(image)
        except BROKEN as error:
            raise ValueError(f"{path}: cannot be decoded ({error})") from None
    if upright.mode.startswith("I"):
        upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
    return upright, full[::-1] if sideways else full


def _mask(path, full):
    """Returns a mask file as an "L" image: its alpha channel where it has one, else its brightness."""
    mask, size = _upright(path)
    if size != full:
        raise ValueError(f"{path}: {size[0]} x {size[1]} pixels; expected the picture's {full[0]} x {full[1]}")
    return mask.convert("RGBA").getchannel("A") if mask.has_transparency_data else mask.convert("L")
