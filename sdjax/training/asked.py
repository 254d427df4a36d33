"""Requests to a running training: SIGTERM, and files in its folder.

    touch outputs/cat/sample-now        # previews after this step
    touch outputs/cat/save-now          # a checkpoint and exports/STEP
    touch outputs/cat/stop              # a checkpoint and the export, then the end; rerun the command to resume

The run removes a file after acting on it, and removes old ones when it starts.  Several processes act at the same step:
SIGTERM to one of them stops all; process 0 looks for files, and at its clock, at logged steps.
"""

import signal
import time
from collections.abc import Iterable
from pathlib import Path

from jax.experimental import multihost_utils

from sdjax.runtime import processes

SAMPLE, SAVE, STOP = "sample-now", "save-now", "stop"
LATE = "late"  # in the place of a file's name: the last checkpoint is older than wanted


class Asked:
    """Remembers SIGTERMs until the step ends, and looks for files and the clock; `close` restores the signal's handler.

    minutes: longest time between checkpoints; 0 is any.
    """

    def __init__(self, folder: Path, minutes: float = 0.0) -> None:
        self.minutes = minutes
        self.saved()
        self.terminated, self.files = False, {name: folder / name for name in (SAMPLE, SAVE, STOP)}
        self.done(self.files)
        self.before = None
        if processes.several():  # JAX handles the signal
            return
        try:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread, as in a web server, which handles signals itself
            pass

    def _ask(self, *_):
        self.terminated = True

    def stopped(self, step: int) -> bool:
        """Returns whether to stop after this step because of a SIGTERM; several processes ask at every step."""
        return multihost_utils.reached_preemption_sync_point(step) if processes.several() else self.terminated

    def now(self, together: bool = True) -> set[str]:
        """Returns the names of the existing files, and LATE; together: whether all processes ask at this step."""
        return set(processes.led(self._there)) if together or not processes.several() else set()

    def _there(self):
        late = 0 < self.minutes <= (time.monotonic() - self.last) / 60
        return [name for name, path in self.files.items() if path.exists()] + [LATE] * late

    def saved(self) -> None:
        """Starts the time until the next checkpoint."""
        self.last = time.monotonic()

    def done(self, names: Iterable[str]) -> None:
        """Removes the files with these names."""
        for name in names if processes.first() else ():
            self.files[name].unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the files and restores the previous handler of SIGTERM."""
        self.done(self.files)
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
