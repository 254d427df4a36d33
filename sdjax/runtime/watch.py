"""Reports the loss of another process in one line, instead of JAX's page of output.

    split()          # first in a program: the child continues, the parent watches it

JAX ends a process that misses another's heartbeat from C++, by abort(); Python cannot print anything then.
"""

import ctypes
import glob
import os
import signal
import sys
import threading

from sdjax.runtime import processes

FIRST = ("coordination_service", "] Terminating process because the JAX distributed service")  # the page's first line
LOST = "another process of this run is lost; rerun the command in all processes, and it resumes"
CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # devices of a TPU, whose hosts find each other by metadata only
REST = 2.0  # seconds for the child's last output; its own children, such as data.workers, may keep the pipe open
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


def split() -> None:
    """Forks if this process may be one of several, and returns in the child; the parent ends with the child's status.

    The parent shows the stderr of the child's libraries, but prints one line instead of a page about a lost process.
    It passes SIGTERM on.
    """
    if not (processes.found() or any(chip for pattern in CHIPS for chip in glob.iglob(pattern))):
        return
    reading, writing = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until a handler is set
    try:
        child = os.fork()
    except BaseException:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        raise
    if child:
        os.close(writing)
        signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os._exit(_watched(reading, child))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    os.close(reading)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")  # Python's own; 2 is what C++ writes to
    os.dup2(writing, 2)
    os.close(writing)


def _watched(reading: int, child: int) -> int:
    """Shows the output of the child's libraries until it ends; returns its status."""
    held: list[str] = []
    reader = threading.Thread(target=_show, args=(reading, held), daemon=True)
    reader.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reader.join(REST)
    if held and status == -signal.SIGABRT:
        print(f"\nerror: {LOST}", file=sys.stderr, flush=True)  # below the bar of the steps
        return 1
    if status != 1:  # with 1 the program has said it in its own line
        sys.stderr.write("".join(held))
        sys.stderr.flush()
    return status if status >= 0 else 128 - status


def _show(reading: int, held: list[str]) -> None:
    """Shows the lines from a pipe; from the first line of a page on, lines go into `held` instead."""
    with os.fdopen(reading, errors="replace") as lines:
        for line in lines:
            if held or any(mark in line for mark in FIRST):
                held.append(line)
            else:
                sys.stderr.write(line)
                sys.stderr.flush()
