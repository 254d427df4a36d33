"""Files of data on this machine or in a bucket: found by path, read by range.

    files = listed("s3://bucket/photos", (".tar",))      # [File(path, size, stamp), ...], sorted by path
    files[0].read(512, 100)                               # 100 bytes from byte 512 on
    files[0].open()                                       # a binary file that can seek

A path is a file, a folder, a pattern ("photos/train-*.tar") or a range of numbers ("train-{0000..0099}.tar", as
WebDataset writes it).  Arrow's own clients read s3:// and gs://; fsspec reads its other protocols (hf, http, abfs,
memory, ...).  Credentials, regions and endpoints come from the protocol's usual environment variables; S3's endpoint
from $AWS_ENDPOINT_URL_S3 or $AWS_ENDPOINT_URL.
"""

import contextlib
import fnmatch
import functools
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from sdjax.data import tables
from sdjax.images import captions, reading
from sdjax.settings import SettingError

NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST = 1_000_000  # most files in a range
BLOCK = 8 << 20  # bytes per request for a bucket's file that is read from front to back
DEEP = 3  # levels of sub-folders that are searched for data
OPEN = 256  # files in buckets whose readers stay open


def remote(path: str) -> bool:
    """Returns whether a path is a URL."""
    return "://" in path


@dataclass(frozen=True)
class File:
    """A file.  size: in bytes.  stamp: the time of its last change, or the bucket's mark of its version."""

    path: str
    size: int
    stamp: str

    def read(self, start: int, length: int) -> bytes:
        """Returns `length` bytes from byte `start` on.  Raises ValueError naming a file that is too short."""
        with said(self.path):
            if remote(self.path):
                found = _reader(self.path, self.size)(start, length)
            else:
                descriptor = os.open(self.path, os.O_RDONLY)
                try:
                    found = os.pread(descriptor, length, start)
                finally:
                    os.close(descriptor)
        if len(found) != length:
            raise ValueError(f"{self.path}: ends before byte {start + length}; it changed or was cut short")
        return found

    def open(self) -> BinaryIO:
        """Returns the file opened for reading; a bucket's file is read BLOCK bytes at a time."""
        with said(self.path):
            if remote(self.path):
                return cast(BinaryIO, io.BufferedReader(_Ranges(self), BLOCK))
            return open(self.path, "rb")


class _Ranges(io.RawIOBase):
    """A File as Python's raw stream."""

    def __init__(self, file: File) -> None:
        self.file, self.place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self.place = offset + (0, self.place, self.file.size)[whence]
        return self.place

    def readinto(self, buffer: Any, /) -> int:
        length = max(0, min(len(buffer), self.file.size - self.place))
        if length:
            buffer[:length] = self.file.read(self.place, length)
        self.place += length
        return length


def listed(path: str, endings: tuple[str, ...]) -> list[File]:
    """Returns the files of a path that have one of these endings, sorted; [] without any.

    A folder is searched DEEP levels down; names that begin with "." are skipped.
    Raises ValueError, with a one-line message, for an unreadable bucket and for a missing file of a range.
    """
    if found := NUMBERS.search(path):
        return [file for one in _range(path, found) for file in _there(one, listed(one, endings))]
    if remote(path):
        with said(path):
            return [file for file in _in_bucket(path) if _ends(file.path, endings)]
    place = Path(path)
    if place.is_dir():
        names = [name for deep in range(DEEP + 1) for name in place.glob("/".join(["*"] * (deep + 1)))]
    elif place.is_file():
        names = [place]
    else:
        names = list(place.parent.glob(place.name)) if place.name and place.parent.is_dir() else []
    kept = [name for name in names if _is_data(name, place, endings)]
    return [_local(name) for name in sorted(kept, key=lambda name: name.as_posix())]


def holds(path: str, endings: tuple[str, ...]) -> bool:
    """Returns whether a folder has files with these endings and, on this machine, no pictures next to them.

    If the folder has neither, its sub-folders decide, down to DEEP levels.
    """
    if remote(path):
        return _remote_holds(path, endings)
    level = [Path(path)] if Path(path).is_dir() else []
    for _ in range(DEEP + 1):
        for place in level:
            found = _kind(place, endings)
            if found is not None:
                return found
        level = [inner for place in level for inner in _folders(place)]
    return False


def _kind(folder, endings):
    """Returns True for a folder with data and no pictures, False for one with pictures, None if it has neither."""
    found = None
    with os.scandir(folder) as entries:
        for entry in entries:
            name = "" if entry.name.startswith(".") or entry.name in captions.METADATA else entry.name.lower()
            if name.endswith(reading.SUFFIXES):  # stops at the first picture of a million
                return False
            found = True if name.endswith(endings) else found
    return found


def _folders(place):
    with os.scandir(place) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))


@functools.lru_cache(8)
def _remote_holds(path: str, endings: tuple[str, ...]) -> bool:
    """Returns whether files with these endings are below a URL; cached, since settings ask repeatedly."""
    return bool(listed(path, endings))


def _range(path, found):
    first, last = found.groups()
    count = int(last) - int(first) + 1
    if not 0 < count <= MOST:
        raise ValueError(f"data.path={path!r}: {found[0]} names {count} files; expected 1 to {MOST}")
    return [path.replace(found[0], f"{number:0{len(first)}}", 1) for number in range(int(first), int(last) + 1)]


def _there(path, files):
    if not files:
        raise ValueError(f"{path}: no such file")
    return files


def _ends(path, endings):
    return path.lower().endswith(endings)


def _is_data(path, root, endings):
    """Returns whether a path below `root` is a data file: not hidden, and not the captions of an image folder."""
    inner = path.relative_to(root).parts if path != root and path.is_relative_to(root) else ()
    shown = not any(part.startswith(".") for part in inner) and path.name not in captions.METADATA
    return shown and _ends(path.name, endings) and path.is_file()


def _local(path):
    state = path.stat()
    return File(str(path), state.st_size, str(state.st_mtime_ns))


# ---- buckets -----------------------------------------------------------------------------------


@contextlib.contextmanager
def said(path: str) -> Iterator[None]:
    """Turns any error of a file or bucket into a ValueError with one line that names the path."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{path}: needs the package {error.name or str(error).split()[-1]}; install it") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # clients raise many types; Arrow's are subclasses of ValueError
        if type(error) in (ValueError, SettingError):
            raise
        lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
        raise ValueError(f"{path}: cannot be read: {(lines or [type(error).__name__])[0][:200]}") from None


def _in_bucket(path):
    """Returns the Files of a URL: one file, a folder's files or a pattern's matches."""
    protocol, inner = path.split("://", 1)
    inner = inner.rstrip("/")
    pattern = any(sign in inner for sign in "*?[")
    root = inner.split("*")[0].split("?")[0].split("[")[0].rpartition("/")[0] if pattern else inner
    found = _arrow_files(protocol, root) if protocol in ("s3", "gs") else _other_files(protocol, root)
    deep = root.count("/") + DEEP + 1
    names = [
        file for file in found
        if (fnmatch.fnmatchcase(file[0], inner) if pattern else file[0].count("/") <= deep)
    ]  # fmt: skip
    return [File(f"{protocol}://{name}", size, stamp) for name, size, stamp in sorted(names)]


def _arrow_files(protocol, inner):
    """Returns [(path in the bucket, size, stamp)] of an object, or of all objects below a folder."""
    system, fs = _arrow(protocol)
    info = system.get_file_info(inner)
    below = fs.FileSelector(inner, recursive=True, allow_not_found=True)
    found = [info] if info.type == fs.FileType.File else system.get_file_info(below)
    return [(one.path, one.size, str(one.mtime_ns)) for one in found if one.type == fs.FileType.File]


def _other_files(protocol, inner):
    system = _spec(protocol)
    marks = (
        "ETag", "etag", "oid", "blob_id", "sha256", "mtime", "LastModified", "last_modified", "Last-Modified", "created"
    )  # fmt: skip
    for name, info in system.find(f"{protocol}://{inner}", detail=True).items():
        info = info if info.get("size") else system.info(name)  # a web server's listing has no sizes
        mark = next((str(info[key]) for key in marks if info.get(key)), "")
        yield name.removeprefix(f"{protocol}://").lstrip("/"), int(info["size"] or 0), mark


def _arrow(protocol):
    """Returns (Arrow's client for "s3" or "gs", the module pyarrow.fs)."""
    tables.arrow()
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _client(protocol, endpoint, _flag("AWS_NO_SIGN_REQUEST")), fs


@functools.lru_cache(4)
def _client(protocol: str, endpoint: str | None, anonymous: bool) -> Any:
    """Returns Arrow's client, which keeps its connections."""
    from pyarrow import fs

    return fs.GcsFileSystem() if protocol == "gs" else fs.S3FileSystem(endpoint_override=endpoint, anonymous=anonymous)


def _flag(name):
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _spec(protocol):
    """Returns fsspec's file system for a protocol."""
    import fsspec

    if protocol not in fsspec.available_protocols():
        raise ValueError(f"{protocol}://: no such protocol; expected s3, gs, hf, http or another of fsspec's")
    return fsspec.filesystem(protocol)


@functools.lru_cache(OPEN)
def _reader(path: str, size: int) -> Callable[[int, int], bytes]:
    """Returns a function read(start, length) for a file in a bucket."""
    protocol, inner = path.split("://", 1)
    if protocol in ("s3", "gs"):
        file = _arrow(protocol)[0].open_input_file(inner)  # one request now, then one per read
        return lambda start, length: file.read_at(length, start)
    system = _spec(protocol)
    return lambda start, length: system.cat_file(path, start=start, end=start + length)
