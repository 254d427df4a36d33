"""Finds the records in uncompressed zip archives, as torch.save writes them.

    records(data)["archive/data/0"]              # Record(start, size, checksum)

Reads the directory only, checks every entry against its record, and unpacks nothing.
Source: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.
"""

import struct
from mmap import mmap
from typing import NamedTuple

MOST = 100_000  # most records; Stable Diffusion with its optimizer has 5,000
FULL = 0xFFFFFFFF  # marks a field whose value is in the zip64 field
DAMAGED = "the archive's directory is damaged"


class Record(NamedTuple):
    """The place of a record's bytes in the file, and their CRC-32."""

    start: int
    size: int
    checksum: int


def records(data: bytes | mmap) -> dict[str, Record]:
    """Returns {name: Record} of an archive.  data: the file's bytes, mapped or read.

    Raises ValueError for a damaged or incomplete archive, compressed or encrypted records, duplicate names, names that
    lead out of the archive, and more than MOST records.
    """
    end = len(data) - 22
    check(end >= 0 and data[end : end + 4] == b"PK\5\6", "the archive is cut off, or something stands behind its end")
    count, size, at = struct.unpack_from("<10xHLL", data, end)
    if end >= 20 and data[end - 20 : end - 16] == b"PK\6\7":  # zip64
        (place,) = struct.unpack_from("<8xQ", data, end - 20)
        check(place < end and data[place : place + 4] == b"PK\6\6", DAMAGED)
        count, size, at = struct.unpack_from("<32xQQQ", data, place)
    check(count <= MOST, f"an archive of {count} records; at most {MOST} are read")
    check(at + size <= end, DAMAGED)
    found, position = {}, at
    for _ in range(count):
        name, record, position = _entry(data, position)
        check(name not in found, f"the archive has {name!r} twice")
        found[name] = record
    check(position == at + size, DAMAGED)
    return found


def _entry(data: bytes | mmap, position: int) -> tuple[str, Record, int]:
    """Returns (name, Record, position of the next entry) for the directory's entry at a position."""
    fields = struct.unpack_from("<4s4xHH4xLLLHHH8xL", data, position)
    signature, flags, method, checksum, packed, size, names, extras, comment, at = fields
    begin = position + 46
    raw = data[begin : begin + names]
    name = raw.decode()
    packed, size, at = _long(data[begin + names : begin + names + extras], packed, size, at)
    check(signature == b"PK\1\2", DAMAGED)
    check(not flags & 1, f"{name!r} is encrypted")
    check(method == 0 and packed == size, f"{name!r} is compressed; torch.save stores records as they are")
    check(not {"", ".", ".."} & set(name.split("/")) and not set(name) & set("\\:\0"), f"a record named {name!r}")
    signature, inner, extra = struct.unpack_from("<4s22xHH", data, at)
    start = at + 30 + inner + extra
    check(signature == b"PK\3\4" and data[at + 30 : at + 30 + inner] == raw, f"the record {name!r} is not in its place")
    check(start + size <= len(data), f"the record {name!r} is cut off")
    return name, Record(start, size, checksum), begin + names + extras + comment


def _long(extra: bytes, packed: int, size: int, at: int) -> tuple[int, int, int]:
    """Returns the sizes and place of a record; takes values that are FULL from its zip64 field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            size, packed, at = (next(values, value) if value == FULL else value for value in (size, packed, at))
        position += 4 + length
    return packed, size, at


def check(right: object, message: str) -> None:
    """Raises ValueError with a message unless `right` is true."""
    if not right:
        raise ValueError(message)
