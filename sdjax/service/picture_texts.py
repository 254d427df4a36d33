"""The texts in a picture's file, by name.

PNG files hold them in chunks, `parameters` (A1111's text) and `sdjax` (the exact record) among them; JPEG and WebP
files hold these two in EXIF's UserComment and ImageDescription.
Source: EXIF 2.3; TIFF 6.0.
"""

import struct
from pathlib import Path
from typing import Any

A1111, OWN = "parameters", "sdjax"  # names of A1111's text and of the exact record
DESCRIPTION, EXIF, USER_COMMENT = 0x010E, 0x8769, 0x9286  # EXIF 2.3; the third lies in the directory of the second
ENCODINGS = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "utf-8", b"\0" * 8: "utf-8"}


def options(kind: str, written: str, data: str, quality: int) -> dict[str, Any]:
    """Returns the arguments of Pillow's save for a format: A1111's text `written`, our record `data`."""
    from PIL.PngImagePlugin import PngInfo

    if kind == "PNG":
        chunks = PngInfo()
        chunks.add_text(A1111, written)
        chunks.add_text(OWN, data)
        return {"pnginfo": chunks}
    lossless = {"lossless": True} if kind == "WEBP" and quality == 100 else {}
    return {"exif": _exif(data, written), "quality": quality, **lossless}


def _exif(description, comment):
    """Returns an EXIF block with two texts in the layout of TIFF 6.0: a directory and its text, twice.

    Not by Pillow, which writes the comment as type BYTE; readers expect UNDEFINED.
    """
    description, comment = description.encode("ascii") + b"\0", b"UNICODE\0" + comment.encode("utf-16-be")
    filled = description + b"\0" * (len(description) % 2)  # directories start at even offsets
    inner = 8 + 2 + 2 * 12 + 4 + len(filled)  # offset of the second directory
    ascii_, long, undefined = 2, 4, 7  # types
    first = struct.pack(">2sHIH", b"MM", 42, 8, 2)
    first += struct.pack(">HHII", DESCRIPTION, ascii_, len(description), 38) + struct.pack(
        ">HHII", EXIF, long, 1, inner
    )
    second = struct.pack(">HHHII", 1, USER_COMMENT, undefined, len(comment), inner + 2 + 12 + 4)
    end = bytes(4)  # no further directory
    return b"Exif\0\0" + first + end + filled + second + end + comment


def of(path: Path) -> dict[str, str]:
    """Returns {name: text} in a picture's file: A1111's under `parameters`, ours under `sdjax`; decodes no pixels.

    Raises OSError for a missing file and ValueError for one that is not a picture.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            held = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
            exif = image.getexif()
            described, comment = exif.get(DESCRIPTION, ""), exif.get_ifd(EXIF).get(USER_COMMENT)
    except OSError:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise ValueError(f"cannot be read ({str(error) or type(error).__name__})") from None
    found = {A1111: _comment(comment)}
    if isinstance(described, str) and described.startswith('{"class": "Re'):
        found[OWN] = described
    return {name: text for name, text in found.items() if text is not None} | held


def _comment(comment):
    """Returns the text of EXIF's UserComment: 8 bytes name the encoding, the text follows."""
    if not isinstance(comment, bytes) or comment[:8] not in ENCODINGS:
        return None
    letters, encoding = comment[8:], ENCODINGS[comment[:8]]
    if encoding == "utf-16-be" and letters[1::2].count(0) > letters[::2].count(0):
        encoding = "utf-16-le"  # some programs write it in their machine's byte order
    return letters.decode(encoding, "replace").lstrip("\ufeff").strip("\0") or None
