"""The process that uses the device: takes jobs from the queue, one after the other.

    python -m sdjax.service.worker --root outputs/ui [--models DIR ...]

One process at a time has the device, by the lock of a file; another one waits for it.  Pictures are made by a Maker,
which keeps its models; for a training job the process becomes the training program (exec), and after it a worker with
an empty memory again.  It outlives its server, ends IDLE seconds after the last job where no server lives, and ends
between two steps when it gets a SIGTERM; what it had taken waits again.  Outputs are named by job, so that a job that
is taken a second time makes what is missing.
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

IDLE = 3.0  # seconds that a worker without a server waits for jobs
LOOK = 0.05  # seconds between two looks at an empty queue
NICE = 5  # the server answers while pictures are made
LOCK = "SDJAX_DEVICE"  # the descriptor of the lock, for the program that this one becomes


def main(arguments: list[str]) -> int:
    """Works a place's queue off; returns the exit status."""
    place = Place.of(arguments)
    private()
    stop = Stop()
    with device(place) as descriptor:
        queue = Queue(place.queue)
        queue.left()
        os.nice(max(0, NICE - os.nice(0)))
        drawing = None  # which takes seconds to import, and a run needs none
        alone = None  # since when no server lives
        while not stop.asked:
            job = queue.head()
            if job is not None and job.kind == "training" and queue.take(os.getpid(), job.id):
                become(place, descriptor, "train", str(job.id))
            if job is not None and job.kind == "tool" and (taken := queue.take(os.getpid(), job.id)) is not None:
                tools.run(place, queue, taken)
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
    """Does a job of pictures, and says in the queue how it ended; whatever a job does, the next one gets its turn."""
    from sdjax.service.batch import line
    from sdjax.settings import SettingError

    try:
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
    """Replaces this program by another one of the same process, which keeps the device."""
    os.set_inheritable(descriptor, True)
    os.environ[LOCK] = str(descriptor)
    sys.stdout.flush()
    command = place.command(*first)
    os.execv(command[0], command)


@contextlib.contextmanager
def device(place: Place) -> Iterator[int]:
    """A context in which this process alone has the device of a place; yields the lock's descriptor."""
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
    """Returns whether a process has the device of a place."""
    descriptor = os.open(place.device, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lives(pid: Any) -> bool:
    """Returns whether a process of this number is there."""
    try:
        os.kill(int(pid), 0)
    except (TypeError, ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


class Stop:
    """Remembers a SIGTERM until the step is over."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the server says when it is over

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
