"""Times jobs that share a machine: they compile side by side and are timed alone; each prints its rows as JSON lines.

    with phase("compile"): ...        # side by side with other compilations
    with phase("time"): ...           # no other job compiles or is timed

Environment variables: GPU_LOCK, the lock file (without it no job waits); GPU_ROWS, the file for the rows; GPU_BEGAN,
the process's start in seconds since the epoch.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

IMPORTED = time.time()


@contextlib.contextmanager
def phase(kind: str) -> Iterator[None]:
    """Holds the lock in its block: shared with other compilations for "compile", exclusive for "time"."""
    path = os.environ.get("GPU_LOCK")
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if kind == "time" else fcntl.LOCK_SH)
        yield


def since_start() -> float:
    """Returns the seconds since this process was started."""
    return time.time() - float(os.environ.get("GPU_BEGAN") or IMPORTED)


def say(row: str, who: str = "sdjax", **figures: Any) -> None:
    """Prints a measurement and appends it to the file of rows; numbers are rounded to 5 digits."""
    short = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in figures.items()}
    line = json.dumps({"row": row, "who": who, **short})
    print(line, flush=True)
    if path := os.environ.get("GPU_ROWS"):
        with open(path, "a") as file:
            file.write(line + "\n")


def median(call: Callable[[], Any], count: int = 3) -> float:
    """Returns the median seconds of `count` calls; a call must wait for its results."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[count // 2]
