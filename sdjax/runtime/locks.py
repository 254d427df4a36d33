"""Locks a folder for one process: a file names the holder and stays locked while that process lives.

    with held("outputs/cat"): ...        # ValueError in one line if another process holds it

The kernel drops the lock (flock) when the process ends, so exactly one other process takes over a dead one's folder.  A
file from another host, or on a file system without flock, is an error, which names the file to remove.
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

FILE = "run.lock"
LONGEST = 200  # letters of a command in a message
PATIENCE = 1.0  # seconds to wait for the signature of a process that has just taken the lock
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(folder: str | os.PathLike, setting: str = "out", file: str = FILE) -> Iterator[None]:
    """A context that holds the folder, created if missing, against other processes.

    file: the name of the lock file; locks with other names are independent.
    At the end it removes the file, and the folder if it created the folder and it is still empty.
    Raises ValueError that names the `setting` and the holder's pid, host and command.
    """
    folder = Path(folder)
    path, named, made = folder / file, f"{setting}={str(folder)!r}", not folder.is_dir()
    descriptor = None
    while descriptor is None:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(path, named)
    try:
        yield
    finally:
        if _is_at(descriptor, path):
            path.unlink()
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # the folder has files now
                folder.rmdir()


def busy(path: Path) -> bool:
    """Returns whether a process of this machine holds a lock file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        _locked(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def turn(folder: str | os.PathLike) -> Iterator[None]:
    """A context for one process at a time per folder; others wait.  On file systems without flock, nobody waits."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _taken(path, named):
    """Returns the descriptor of the lock file, locked and signed, or None if another process was faster."""
    descriptor, new = _opened(path)
    if descriptor is None:
        return None
    try:
        locked = _locked(descriptor)
        if not _is_at(descriptor, path):  # its holder has just removed it
            os.close(descriptor)
            return None
        left = None if new else _read(path)
        if not new and (not locked or left and left["host"] != socket.gethostname()):
            raise ValueError(_refusal(named, left, f"if that is over, remove {path}"))
        _sign(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(_refusal(named, _holder(path), "wait for its end")) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _opened(path):
    """Returns (descriptor, whether this call created the file); the descriptor is None if it just came or went."""
    try:
        return os.open(path, os.O_RDWR), False
    except FileNotFoundError:
        pass
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    except (FileNotFoundError, FileExistsError):
        return None, False


def _locked(descriptor):
    """Locks a file; returns False on a file system without flock.  Raises BlockingIOError if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return False
    return True


def _is_at(descriptor, path):
    """Returns whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(descriptor):
    """Writes this process's pid, host and command into a file."""
    own = {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.orig_argv)}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(own).encode(), 0)


def _read(path):
    """Returns {"pid", "host", "command"} from a lock file, or None without them."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, FileNotFoundError):
        return None
    return found if isinstance(found, dict) and {"pid", "host", "command"} <= found.keys() else None


def _holder(path):
    """Returns the holder's entry in a lock file; waits a little if it is not written yet."""
    until = time.monotonic() + PATIENCE
    found = _read(path)
    while time.monotonic() < until and (found is None or _dead(found)):
        time.sleep(0.02)
        found = _read(path)
    return found


def _dead(signed):
    """Returns whether the process is of this host and no longer runs."""
    if signed["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(signed["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):  # another user's
        return False
    return False


def _refusal(named, signed, advice):
    """Returns the error's line: who has the folder, and what to do."""
    if signed is None:
        return f"{named}: another process has it; {advice}, or choose another"
    command = " ".join(str(signed["command"]).split())[:LONGEST]
    return f"{named}: pid {signed['pid']} on {signed['host']} has it ({command}); {advice}, or choose another"
