"""Turns errors of full disks and full memory into one line that names what is safe and what helps.

with disk("outputs/cat", "the last checkpoint is whole"): ...      # NoRoom, a ValueError, for a full disk
with memory("out of memory: a smaller data.batch helps"): ...      # ValueError for a full device or host
"""

import contextlib
import errno
import os
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM)


class NoRoom(ValueError):
    """The disk is full, so that continuing is useless."""


def explained(error: BaseException, path: str | os.PathLike[str], safe: str) -> BaseException:
    """Returns the error to raise; for a full disk or forbidden folder, one line that names the path.

    safe: the part of the message about what is not lost.
    """
    if not isinstance(error, OSError) or error.errno not in (*FULL, *FORBIDDEN):
        return error
    line = f"{path}: cannot be written: {error.strerror}; {safe}"
    return NoRoom(line) if error.errno in FULL else ValueError(line)


@contextlib.contextmanager
def disk(path: str | os.PathLike[str], safe: str) -> Iterator[None]:
    """Turns a full disk or a forbidden folder in the block into one line that names the path; see explained."""
    try:
        yield
    except OSError as error:
        told = explained(error, path, safe)
        if told is error:
            raise
        raise told from error


def lacks_memory(error: BaseException) -> bool:
    """Returns whether an error says that the device's or the host's memory is full."""
    said = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said or "ut of memory" in said


@contextlib.contextmanager
def memory(line: str) -> Iterator[None]:
    """Turns an out-of-memory error of the device or the host into a ValueError with this line."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise ValueError(line) from error
