"""Pictures on disk: finding them with their captions and masks, decoding them safely, cutting them.

    items = find("photos/cat")
    picture, mask = decode(items[0], size=512, masked=True)         # PIL images, upright
    cut(picture, 512, place=(0.5, 0.5), flip=False)              # uint8 [512 512 3]

captions.py finds the captions.  A mask is `name.mask.png`, `name-masklabel.png` or the transparent part of the picture
itself.  Paths come from listing the folder; names in files are only looked up in this list.
"""

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from sdjax.images import captions, masks

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Other picture formats, which are skipped: photos of phones and cameras, and files of browsers and editors.
OTHERS = tuple(
    ".heic .heif .avif .jxl .jp2 .jfif .gif .bmp .tif .tiff .tga .psd .svg"
    " .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split()
)
FORMATS = ("JPEG", "PNG", "WEBP")
MASK_ENDINGS = (".mask.png", "-masklabel.png")  # the second is OneTrainer's
# Endings of files that belong to another picture and are not training pictures.
BESIDE = (*MASK_ENDINGS, *(f".condition{ending}" for ending in SUFFIXES), ".segmentation.png")
MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB at 3 bytes a pixel
MIN_SIDE = 16
ACCEPTED = "expected .jpg .png .webp"
# Transforms for EXIF's orientations (EXIF 2.32, tag 0x0112), and the orientations that swap width and height.
_TURN = Image.Transpose
TURNS = dict(zip(range(2, 9), (_TURN.FLIP_LEFT_RIGHT, _TURN.ROTATE_180, _TURN.FLIP_TOP_BOTTOM, _TURN.TRANSPOSE,
                               _TURN.ROTATE_270, _TURN.TRANSVERSE, _TURN.ROTATE_90), strict=True))  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Item:
    """A picture on disk.

    path: its file.  caption: "" for none.  mask: the mask's file, or None.  subject: the sub-folder.
    times: repeats per epoch, from the folder's name.
    """

    path: Path
    caption: str = ""
    mask: Path | None = None
    subject: str = ""
    times: int = 1


@dataclass(frozen=True)
class Held:
    """The bytes of a file from a shard or a table.  name: its place, for messages, such as "a.parquet, row 3"."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


class Readable(Protocol):
    """A picture with its mask: an Item, or a HeldItem."""

    @property
    def path(self) -> Path | Held: ...

    @property
    def mask(self) -> Path | Held | None: ...


@dataclass(frozen=True)
class HeldItem:
    """A picture in memory, and its mask or None."""

    path: Held
    mask: Held | None = None


def find(path: str | Path) -> tuple[Item, ...]:
    """Returns the Items of a folder and its sub-folders sorted by path, or the Item of one picture.

    Raises ValueError for a path that is missing or has no pictures, for unreadable captions, and for captions and masks
    that are links out of the folder.
    """
    root, files = _listed(path)
    alone = root != Path(path)
    paths = [Path(path)] if alone else [p for p in files if _is_picture(p)]
    if not paths:
        passed = counted(passed_over(path))
        raise ValueError(f"data.path={str(path)!r}: no images{f' ({passed} passed over)' * bool(passed)}; {ACCEPTED}")
    _check_links(root, files, None if not alone else Path(path).stem)
    words, masks_of = captions.of(root, files, paths, whole=not alone), captions.beside(files, MASK_ENDINGS)
    return tuple(_item(p, root, words.get(p), masks_of.get((p.parent, p.stem))) for p in paths)


def passed_over(path: str | Path) -> dict[str, int]:
    """Returns the number of files per unsupported picture format, {".heic": 2}, in a folder and its sub-folders."""
    if Path(path).is_file():
        return {}
    endings = Counter(file.suffix.lower() for file in _listed(path)[1])
    return {ending: endings[ending] for ending in sorted(endings) if ending in OTHERS}


def counted(endings: dict[str, int]) -> str:
    """Returns "2 .heic, 1 .gif" for {".heic": 2, ".gif": 1}."""
    return ", ".join(f"{count} {ending}" for ending, count in endings.items())


def decode(item: Readable, size: int, masked: bool = False) -> tuple[Image.Image, Image.Image | None]:
    """Returns (picture, mask): an upright RGB image on white and, if `masked`, an "L" image of its size, else None.

    A picture whose short side is at least 4 times `size` is averaged down by an integer factor; the short side stays at
    least twice `size`.  Without a mask file, the alpha channel is the mask; without transparent pixels the mask is
    white.
    Raises ValueError naming the file if it is not an image, too large, smaller than 16 pixels or truncated, or if its
    mask is empty or has another size.
    """
    image, full = _upright(item.path, size)
    picture = _over_white(image)
    factor = max(1, min(picture.size) // (2 * size))
    mask = None
    if masked:
        own = image.getchannel("A") if image.mode == "RGBA" else Image.new("L", picture.size, 255)
        mask = _mask(item.mask, full) if item.mask else own
        if mask.getextrema()[1] == 0:
            raise ValueError(f"{item.mask or item.path}: the mask is empty, so nothing of the picture would train")
    picture = picture.reduce(factor) if factor > 1 else picture
    return picture, mask.resize(picture.size, Image.Resampling.BOX) if mask else None


def picture(path: str | Path | Held) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels of a picture file, upright and on white, for image-to-image or a ControlNet.

    Source of the white background: lllyasviel's ControlNet (annotator/util.py, HWC3).
    Raises ValueError naming the file if it is not a picture, see decode.
    """
    return np.asarray(_over_white(_upright(path)[0]))


def mask(path: str | Path | Held) -> UInt8[np.ndarray, "H W"]:
    """Returns the mask in a picture file, upright, 255 where to paint; see masks.of.

    Raises ValueError naming the file if it is not a picture, see decode.
    """
    return np.asarray(masks.of(_upright(path)[0]))


def has_mask(item: Readable) -> bool:
    """Returns whether a picture has a mask file or transparent pixels.

    Reads only the header of pictures that cannot have transparent pixels.
    """
    if item.mask:
        return True
    with _open(item.path) as image:
        if not image.has_transparency_data:
            return False
        with _said(item.path, _undecoded):
            return masks.opened(image).mode == "RGBA"


def shape(path: str | Path | Held) -> tuple[int, int]:
    """Returns (height, width) of an upright picture; reads only the header.

    Raises ValueError naming the file if it is not a picture, see decode.
    """
    with _open(path) as image, _said(path, _undecoded):
        width, height = image.size
        return (width, height) if image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS else (height, width)


def content(path: str | Path | Held, most: int) -> bytes:
    """Returns the bytes of a file.  Raises ValueError naming a file of more than `most` bytes."""
    with io.BytesIO(path.data) if isinstance(path, Held) else open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: longer than {most} bytes")
    return data


def cut(
    image: Image.Image, size: int | tuple[int, int], place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> UInt8[np.ndarray, "h w *channels"]:
    """Returns the largest crop of an image with the aspect ratio of `size`, resized to it: uint8 [h w 3]; a mask [h w].

    size: (h, w), or the side of a square.
    place: position of the crop within its range, (x, y) from 0 (left, top) to 1, rounded to whole pixels.
    """
    h, w = size if isinstance(size, tuple) else (size, size)
    width, height = image.size
    part = (width, min(height, round(width * h / w))) if width * h <= height * w else (round(height * w / h), height)
    left, top = (int(at * (whole - own) + 0.5) for at, whole, own in zip(place, image.size, part, strict=True))
    smooth = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    made = np.asarray(image.resize((w, h), smooth, box=(left, top, left + part[0], top + part[1])))
    return np.ascontiguousarray(made[:, ::-1]) if flip else made


def subject(path: str | Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the central square of a picture file, upright and on white, uint8 [size size 3].

    Raises ValueError naming the file if it is not a picture, see decode.
    """
    return cut(decode(Item(Path(path)), size)[0], size)


def digest(items: Iterable[Item]) -> str:
    """Returns the first 16 hex digits of a SHA-256 over the files' own SHA-256 digests, in order."""
    total = hashlib.sha256()
    for item in items:
        with item.path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def _listed(path):
    """Returns (folder, its files and its sub-folders' files, by name); for a picture only its folder's own files."""
    root, alone = Path(path), Path(path).is_file()
    if not alone and not root.is_dir():
        raise ValueError(f"data.path={str(path)!r}: no such file or folder")
    root = root.parent if alone else root
    found = [(p.relative_to(root), p) for p in (root.iterdir() if alone else root.rglob("*"))]
    shown = [(name.as_posix(), p) for name, p in found if not any(part.startswith(".") for part in name.parts)]
    return root, [p for _, p in sorted(shown) if p.is_file()]


def _check_links(root, files, stem):
    """Raises ValueError for a caption, metadata or a mask that is a link out of the folder.

    stem: checks only the files of this picture; None checks all.
    """
    for path in files:
        told = path.name in captions.METADATA or path.name.lower().endswith((*captions.ENDINGS, *BESIDE))
        if told and (stem is None or path.name.startswith(stem)) and path.is_symlink():
            if not path.resolve().is_relative_to(root.resolve()):
                raise ValueError(f"{path}: a link that leads out of {root}; expected the file itself")


def _is_picture(path):
    return path.suffix.lower() in SUFFIXES and not path.name.lower().endswith(BESIDE)


def _item(path, root, caption, mask):
    """Returns the Item of a picture; its own caption takes precedence over the words in its folder's name."""
    folder = path.parent.relative_to(root)
    times, words = captions.of_folder(folder)
    return Item(path, words if caption is None else caption, mask, folder.as_posix() if folder.name else "", times)


@contextlib.contextmanager
def _said(path, what):
    """Turns Pillow's errors, which are of any kind for damaged files, into one line: the file, then what(error).

    For a file that the system cannot open, such as a missing one, the line has the system's own reason.
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
    """Returns a PIL image after reading its header and checking its size; the caller closes it."""
    with _said(path, _unopened):
        image = Image.open(io.BytesIO(path.data) if isinstance(path, Held) else path, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE:
        image.close()
        wanted = (
            f"at most {MAX_PIXELS} pixels" if min(width, height) >= MIN_SIDE else f"at least {MIN_SIDE} on each side"
        )
        raise ValueError(f"{path}: {width} x {height} pixels; expected {wanted}")
    return image


def _upright(path, size=None):
    """Returns (masks.opened's image, (width, height) of the whole picture), turned by EXIF's orientation.

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
