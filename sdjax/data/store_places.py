"""The places of a store's records, in a memory-mapped file of sorted keys; saves scanning the records.

A file has a header of 64 bytes and four columns.  The header holds a mark, the number of records, the byte of the store
where the last one ends, and the CRC-32 of the columns.  Each column has 8 bytes per record: the two halves of the key,
the place of the arrays, their length.
"""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdjax.data import tables
from sdjax.formats.storage import files

HEAD = struct.Struct("<16sQQI28x")
MAGIC = b"sdjax places 1\n\0"


class Places:
    """The places of records; empty if the file is missing, damaged or of another kind.

    end: the byte of the store where the last of these records ends.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.end, self.columns = path, 0, np.zeros((4, 0), np.uint64)
        try:
            with path.open("rb") as file:
                mark, count, end, total = HEAD.unpack(file.read(HEAD.size))
                found = tables.checksum(file)
            if mark == MAGIC and found == total and path.stat().st_size == HEAD.size + 32 * count and count:
                self.columns = np.memmap(path, "<u8", "r", HEAD.size, (4, count))
                self.end = end
        except (OSError, struct.error):
            pass

    def __len__(self) -> int:
        return self.columns.shape[1]

    def __contains__(self, name: bytes) -> bool:
        return self.get(name) is not None

    def get(self, name: bytes) -> tuple[int, int] | None:
        """Returns (place, length) of the arrays of a key of 16 bytes; None for an unknown key."""
        first, second = np.frombuffer(name, ">u8").astype(np.uint64)
        i = int(np.searchsorted(self.columns[0], first))
        while i < len(self) and self.columns[0][i] == first:
            if self.columns[1][i] == second:
                return int(self.columns[2][i]), int(self.columns[3][i])
            i += 1
        return None

    def with_new(self, new: Mapping[bytes, tuple[int, int]], end: int) -> "Places":
        """Writes these places and new ones {key: (place, length)} to the file and returns them."""
        keys = np.frombuffer(b"".join(new), ">u8").reshape(-1, 2).T.astype("<u8")
        added = np.concatenate([keys, np.array(list(new.values()), "<u8").reshape(-1, 2).T])
        both = np.concatenate([added, self.columns], 1)
        both = both[:, np.lexsort((both[1], both[0]))]  # stable: of one key the new place comes first
        again = (both[:2, 1:] == both[:2, :-1]).all(0)
        data = np.ascontiguousarray(both[:, np.r_[True, ~again]], "<u8")
        with files.new_file(self.path) as temporary:
            temporary.write_bytes(HEAD.pack(MAGIC, data.shape[1], end, zlib.crc32(data.tobytes())) + data.tobytes())
        return Places(self.path)

    def none(self) -> "Places":
        """Removes the file, which belongs to other records, and returns empty places."""
        self.path.unlink(missing_ok=True)
        return Places(self.path)
