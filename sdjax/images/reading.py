"""Pictures on disk: finding them with their captions and masks, decoding them safely, cutting them square.

    items = find("photos/cat")
    picture, mask = decode(items[0], size=512, masked=True)         # PIL images, upright
    square(picture, 512, place=(0.5, 0.5), flip=False)              # uint8 [512 512 3]

A caption is the text of `name.txt` or of metadata.jsonl, a line {"file_name": "name.jpg", "text": "..."} per picture;
a mask is `name.mask.png`, `name-masklabel.png` or the picture's own alpha channel.  Paths come from listing the
folder; a file's text is only ever looked up among them.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from sdjax.images import masks

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MASK_ENDINGS = (".mask.png", "-masklabel.png")  # the second as OneTrainer writes it
METADATA = "metadata.jsonl"  # as Hugging Face's image folders
MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB at 3 bytes a pixel
MIN_SIDE = 16
MAX_CAPTION_BYTES = 1 << 16
ACCEPTED = "expected .jpg .png .webp"
# What EXIF's orientations ask for (EXIF 2.32, tag 0x0112), and those that make a wide picture a high one.
_TURN = Image.Transpose
TURNS = dict(zip(range(2, 9), (_TURN.FLIP_LEFT_RIGHT, _TURN.ROTATE_180, _TURN.FLIP_TOP_BOTTOM, _TURN.TRANSPOSE,
                               _TURN.ROTATE_270, _TURN.TRANSVERSE, _TURN.ROTATE_90), strict=True))  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)


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
    A picture without a mask file is its own mask where something of it is clear (masks.opened), else the mask is white.
    Raises ValueError naming the file: no image, too large, smaller than 16 pixels, cut short, a mask of another size
    or an empty one.
    """
    image, full = _upright(item.path, size)
    picture = _over_white(image)
    factor = max(1, min(picture.size) // (2 * size))
    mask = None
    if masked:
        own = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", picture.size, 255)
        mask = _mask(item.mask, full) if item.mask else own
        if mask.getextrema()[1] == 0:
            raise ValueError(f"{item.mask or item.path}: the mask is empty; nothing of the picture would be learned")
    picture = picture.reduce(factor) if factor > 1 else picture
    return picture, mask.resize(picture.size, Image.Resampling.BOX) if mask else None


def picture(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels of a picture's file, upright and over white, as pictures to begin with and for ControlNets are.

    Over white: as lllyasviel's ControlNet reads them (annotator/util.py, HWC3).
    Raises ValueError naming the file when it is no picture, see decode.
    """
    return np.asarray(_over_white(_upright(path)[0]))


def mask(path: str | Path) -> UInt8[np.ndarray, "H W"]:
    """Returns the mask that a picture's file stands for, upright, 255 where to paint: see masks.of.

    Raises ValueError naming the file when it is no picture, see decode.
    """
    return np.asarray(masks.of(_upright(path)[0]))


def has_mask(item):
    """Returns whether a picture brings a mask: a file of its own, or something clear in it.

    Of pictures that cannot be clear only the header is read.
    """
    if item.mask:
        return True
    with _open(item.path) as image:
        if not image.has_transparency_data:
            return False
        with _said(item.path, _undecoded):
            return masks.opened(image).mode == "RGBA"


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
    return square(decode(Item(Path(path)), size)[0], size)


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


@contextlib.contextmanager
def _said(path, what):
    """Turns whatever Pillow raises, which is anything on damaged files, into one line: the file and `what` of the error.

    A file that the system does not give, such as a missing one, is told by the system's own reason.
    """
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: more than {MAX_PIXELS} pixels; make it smaller") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror.lower() if error.strerror else what(error)}") from None
    except Exception as error:
        raise ValueError(f"{path}: {what(error)}") from None


def _unopened(error):
    return f"not an image; {ACCEPTED}"


def _undecoded(error):
    return f"cannot be decoded ({next(iter(str(error).splitlines()), type(error).__name__)})"


def _open(path):
    """Returns a PIL image of which only the header is read, its size checked; the caller closes it."""
    with _said(path, _unopened):
        image = Image.open(path, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE:
        image.close()
        wanted = (
            f"at most {MAX_PIXELS} pixels" if min(width, height) >= MIN_SIDE else f"at least {MIN_SIDE} on each side"
        )
        raise ValueError(f"{path}: {width} x {height} pixels; expected {wanted}")
    return image


def _upright(path, size=None):
    """Returns (image as masks.opened gives it, (width, height) of the whole picture), turned as EXIF says.

    A JPEG much larger than `size` is decoded at 1/2, 1/4 or 1/8, to at least twice `size` on its short side.
    """
    with _open(path) as image, _said(path, _undecoded):
        full = image.size
        if size and image.format == "JPEG":
            image.draft(None, (2 * size, 2 * size))
        whole = masks.opened(image)
        turn = image.getexif().get(ExifTags.Base.Orientation)
    upright = whole.transpose(TURNS[turn]) if turn in TURNS else whole
    return upright, full[::-1] if turn in SIDEWAYS else full


def _over_white(image):
    """Returns an "RGB" or "RGBA" image as "RGB", over white."""
    if image.mode == "RGB":
        return image
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), image.getchannel("A"))


def _mask(path, full):
    """Returns a mask file as an "L" image."""
    image, size = _upright(path)
    if size != full:
        raise ValueError(f"{path}: {size[0]} x {size[1]} pixels; expected the picture's {full[0]} x {full[1]}")
    return masks.of(image)
