"""Says in one line that another process of a run is lost, where JAX would end this one with a page.

    split()          # first thing in a program: the child goes on, the parent watches it

JAX ends a process that misses another's heartbeat from C++, by abort(); nothing in Python can say something then.
"""

import ctypes
import glob
import os
import signal
import sys
import threading

from sdjax.runtime import processes

FIRST = ("coordination_service", "] Terminating process because the JAX distributed service")  # of such a page
LOST = "another process of this run is lost; rerun the command in all processes, and it resumes"
CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # of a TPU, whose hosts know each other by their metadata alone
REST = 2.0  # seconds for what the child said last; its own children, such as data.workers, may keep the pipe open
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


def split() -> None:
    """Where this process may be one of several: returns in a child; the parent ends as the child does.

    The parent shows what libraries write to stderr, but one line for the page of a lost process, and passes SIGTERM on.
    """
    if not (processes.found() or any(chip for pattern in CHIPS for chip in glob.iglob(pattern))):
        return
    reading, writing = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until somebody hears it
    try:
        child = os.fork()
    except BaseException:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        raise
    if child:
        os.close(writing)
        signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal gives it to both
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
    """Shows what the child's libraries say until it ends; returns its status."""
    held: list[str] = []
    reader = threading.Thread(target=_show, args=(reading, held), daemon=True)
    reader.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reader.join(REST)
    if held and status == -signal.SIGABRT:
        print(f"error: {LOST}", file=sys.stderr, flush=True)
        return 1
    if status != 1:  # with 1 the program has said it in its own line
        sys.stderr.write("".join(held))
        sys.stderr.flush()
    return status if status >= 0 else 128 - status


def _show(reading: int, held: list[str]) -> None:
    """Shows the lines that come from a pipe; those from the first of a page on go into `held`."""
    with os.fdopen(reading, errors="replace") as lines:
        for line in lines:
            if held or any(mark in line for mark in FIRST):
                held.append(line)
            else:
                sys.stderr.write(line)
                sys.stderr.flush()
