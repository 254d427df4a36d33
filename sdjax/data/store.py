"""Arrays on disk by key: records appended to a file, each with its own checksums.

    store = Store("cache/moments.records")
    found = store.get(key("moments", digest, 512))      # {"moments": array} or None
    store.put(key("moments", digest, 512), {"moments": array})

A record is a header of 32 bytes (key, length, CRC-32 of these, CRC-32 of the arrays) and the arrays as safetensors.
Opening a store cuts off the incomplete record of a killed process and ignores damaged records; both are computed again.
Several processes may share a file.

A store of more than MANY records keeps their places in a memory-mapped file NAME.places (store_places.py).  So opening
it neither reads the records nor holds their keys in memory.  A record is then checked when it is read.
"""

import fcntl
import hashlib
import json
import mmap
import os
import struct
import threading
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from sdjax.data.store_places import Places
from sdjax.formats.storage import files
from sdjax.runtime import room

MANY = 4096  # beyond this number of new records, a store writes their places to a file
MAGIC = b"sdjax records 1\n"
HEAD = struct.Struct("<16sQII")  # key, length of the arrays, CRC-32 of key and length, CRC-32 of the arrays
Arrays = dict[str, np.ndarray]


def key(*parts: Any) -> bytes:
    """Returns the key for these plain values: 16 bytes of a SHA-256."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


class Store:
    """The records of a file, created if missing; `damaged`: the number of unreadable records.

    Raises ValueError for a file of another kind.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.new, self.damaged, self.end = Path(path), {}, 0, 0
        self.bad = set()  # places whose record is damaged
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.old = Places(self.path.with_suffix(".places"))
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        weakref.finalize(self, os.close, self.file)
        self.threads = threading.Lock()
        self._changed(lambda: None)

    def __reduce__(self) -> tuple:
        return Store, (self.path,)

    def __contains__(self, name: bytes) -> bool:
        return self._place(name) is not None

    def __len__(self) -> int:
        return len(self.new) + len(self.old)

    def _place(self, name):
        place = self.new.get(name) or self.old.get(name)
        return None if place in self.bad else place

    def get(self, name: bytes) -> Arrays | None:
        """Returns the arrays of a key; None if they are missing or damaged."""
        place = self._place(name)
        if place is None:
            return None
        found = os.pread(self.file, HEAD.size + place[1], place[0] - HEAD.size)
        data = memoryview(found)[HEAD.size :]
        if len(data) == place[1] and HEAD.unpack(found[: HEAD.size])[::3] == (name, zlib.crc32(data)):
            return load(bytes(data))
        self.bad.add(place)  # so that `put` writes it again
        return None

    def look(self) -> None:
        """Reads the records that other processes have added."""
        self._changed(lambda: None)

    def settle(self) -> None:
        """Writes the records' places to a file if there are more than MANY new ones."""
        if len(self.new) > MANY:
            with self.threads:
                self.old = self.old.with_new(self.new, self.end)
                self.new = {}

    def forget(self) -> None:
        """Removes the file of places, so that the next Store scans all records and finds the damaged ones."""
        self.old.path.unlink(missing_ok=True)

    def put(self, name: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the arrays of a key.  Raises ValueError if the disk is full."""
        data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        start = name + struct.pack("<Q", len(data))
        record = start + struct.pack("<II", zlib.crc32(start), zlib.crc32(data)) + data
        files.check_room(self.path, len(record))

        def write():
            if name not in self:
                with room.disk(self.path, "its other records are whole"):
                    left = memoryview(record)
                    while left:  # a nearly full disk may take a part only
                        left = left[os.write(self.file, left) :]

        self._changed(write)

    def _changed(self, write):
        """Locks the file, reads new records of other processes, calls write() and reads its record."""
        with self.threads:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            try:
                self._read()
                write()
                self._read()
            finally:
                fcntl.flock(self.file, fcntl.LOCK_UN)

    def _read(self):
        """Reads the records from self.end on; cuts off an incomplete record at the end."""
        size = os.fstat(self.file).st_size
        if self.end == 0 and len(self.old):
            if os.pread(self.file, len(MAGIC), 0) == MAGIC and self.old.end <= size:
                self.end = self.old.end
            else:
                self.old = self.old.none()
        if size == self.end > 0:
            return
        if size:
            self._look(size)
        if self.end == 0:
            os.ftruncate(self.file, 0)
            os.write(self.file, MAGIC)
            self.end = len(MAGIC)
        elif self.end < size:
            self.damaged += 1
            os.ftruncate(self.file, self.end)

    def _look(self, size):
        """Reads the complete records from self.end on and moves self.end behind them."""
        with mmap.mmap(self.file, size, access=mmap.ACCESS_READ) as whole, memoryview(whole) as view:
            self.end = self._scanned(view, size)

    def _scanned(self, view, size):
        """Adds the places of complete records; returns where the last one ends."""
        end = self.end
        if end == 0:
            start = bytes(view[: len(MAGIC)])
            if start != MAGIC[: len(start)]:
                raise ValueError(f"{self.path}: is no file of records; remove it, or choose another data.cache")
            if len(start) < len(MAGIC):
                return 0
            end = len(start)
        while end + HEAD.size <= size:
            name, length, head, sum_ = HEAD.unpack(view[end : end + HEAD.size])
            first, last = end + HEAD.size, end + HEAD.size + length
            if head != zlib.crc32(view[end : end + 24]) or last > size:
                break
            if zlib.crc32(view[first:last]) == sum_:
                self.new[name] = (first, length)  # a key of `old` too: its record there is damaged
            else:
                self.damaged += 1
            end = last
        return end


class Memory:
    """Arrays by key in memory, with a Store's interface."""

    path = "memory"

    def __init__(self) -> None:
        self.arrays, self.damaged = {}, 0

    def __contains__(self, name: bytes) -> bool:
        return name in self.arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def get(self, name: bytes) -> Arrays | None:
        """Returns the arrays of a key; None if they are missing."""
        return self.arrays.get(name)

    def settle(self) -> None:
        """Does nothing: there is no file."""

    def forget(self) -> None:
        """Does nothing: there is no file."""

    def put(self, name: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        """Stores the arrays of a key."""
        self.arrays[name] = dict(arrays)
