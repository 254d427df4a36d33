"""The process that uses the device: takes jobs from the queue, one after the other.

    python -m sdjax.service.worker --root outputs/ui [--models DIR ...]

A file lock gives one process at a time the device; others wait for it.  A Maker makes pictures and keeps its models.
For a training job the process becomes the training program (exec), and afterwards a worker with empty memory again.
The worker outlives its server and ends IDLE seconds after the last job if no server is alive.  On SIGTERM it ends
between two steps, and its job waits again.  Outputs are named by job, so a job taken again makes only missing pictures.
"""

import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from sdjax.service import tools
from sdjax.service.place import Place, private
from sdjax.service.queue import CANCELLED, DONE, FAILED, Job, Queue

IDLE = 3.0  # seconds that a worker waits for jobs without a server
LOOK = 0.05  # seconds between reads of an empty queue
NICE = 5  # lower priority, so that the server answers during sampling
LOCK = "SDJAX_DEVICE"  # the lock's descriptor, for the program after exec


def main(arguments: list[str]) -> int:
    """Runs the jobs of a place's queue; returns the exit status."""
    place = Place.of(arguments)
    private()
    stop = Stop()
    with device(place) as descriptor:
        queue = Queue(place.queue)
        queue.left()
        os.nice(max(0, NICE - os.nice(0)))
        drawing = None  # takes seconds to import, and training does not need it
        alone = None  # time since when no server is alive
        while not stop.asked:
            job = queue.head()
            if job is not None and job.kind == "training" and queue.take(os.getpid(), job.id):
                become(place, descriptor, "train", str(job.id))
            if job is not None and job.kind == "tool" and (taken := queue.take(os.getpid(), job.id)) is not None:
                tools.run(place, queue, taken, lambda: stop.asked)
                continue
            drawing = drawing or _drawing(place, queue, stop)
            taken = queue.take(os.getpid(), job.id) if job is not None else None
            if taken is not None:
                run(queue, taken, drawing)
                alone = None
                continue
            drawing.warm()
            served = lives(queue.option("server"))
            alone = None if served else alone or time.monotonic()
            if not place.queue.exists() or alone is not None and time.monotonic() - alone > IDLE:
                break
            time.sleep(LOOK)
    return 0


def _drawing(place: Place, queue: Queue, stop: "Stop") -> Any:
    from sdjax.service.drawing import Drawing

    return Drawing(place, queue, stop)


def run(queue: Queue, job: Job, drawing: Any) -> None:
    """Runs a picture job and writes the outcome to the queue; no error of a job stops the worker."""
    from sdjax.runtime import accelerator
    from sdjax.service.batch import line
    from sdjax.settings import SettingError

    try:
        accelerator.check()
        state, result = drawing.make(job)
    except Exception as error:
        said = str(error) if isinstance(error, SettingError) else line(error)
        queue.finish(job.id, FAILED, drawing.result(job), drawing.place.hidden(said))
        return
    if state in (DONE, CANCELLED):
        queue.finish(job.id, state, result)
    else:
        queue.back(job.id)


def become(place: Place, descriptor: int, *first: str) -> None:
    """Replaces this program by another in the same process (exec), which keeps the device."""
    os.set_inheritable(descriptor, True)
    os.environ[LOCK] = str(descriptor)
    sys.stdout.flush()
    command = place.command(*first)
    os.execv(command[0], command)


@contextlib.contextmanager
def device(place: Place) -> Iterator[int]:
    """A context that gives this process alone a place's device; yields the lock's descriptor."""
    given = os.environ.pop(LOCK, None)
    descriptor = int(given) if given else os.open(place.device, os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(descriptor, False)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def taken(place: Place) -> bool:
    """Returns whether a process uses a place's device."""
    descriptor = os.open(place.device, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lives(pid: Any) -> bool:
    """Returns whether a process with this number exists."""
    try:
        os.kill(int(pid), 0)
    except (TypeError, ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


class Stop:
    """Remembers a SIGTERM until the current step ends."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal; the server ends the worker

    def _ask(self, *_: Any) -> None:
        self.asked = True


def train(place: Place, id: int) -> int:
    """Runs a training job in this process, then becomes a worker again."""
    private()
    with device(place) as descriptor:
        queue = Queue(place.queue)
        from sdjax.service import teaching

        teaching.run(place, queue, id)
        become(place, descriptor)
    return 0


if __name__ == "__main__":
    program = sys.argv[1:]
    if program[:1] == ["train"]:
        sys.exit(train(Place.of(program[2:]), int(program[1])))
    sys.exit(main(program))
