"""What is asked of a run while it trains: by SIGTERM, and by files that somebody drops into its folder.

    touch outputs/cat/sample-now        # previews after this step
    touch outputs/cat/save-now          # a checkpoint and exports/STEP
    touch outputs/cat/stop              # a checkpoint and the export, and the run is over; the same line goes on

A file is removed when it is done.  Files that lie there before the run begins are removed unread.
"""

import signal
from collections.abc import Iterable
from pathlib import Path

SAMPLE, SAVE, STOP = "sample-now", "save-now", "stop"


class Asked:
    """Remembers a SIGTERM until the step is over, and looks for files; `release` gives the signal back."""

    def __init__(self, folder: Path) -> None:
        self.terminated, self.files = False, {name: folder / name for name in (SAMPLE, SAVE, STOP)}
        self.done(self.files)
        try:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread, as in a web server: somebody else handles signals there
            self.before = None

    def _ask(self, *_):
        self.terminated = True

    def now(self) -> set[str]:
        """Returns the names of the files that are there."""
        return {name for name, path in self.files.items() if path.exists()}

    def done(self, names: Iterable[str]) -> None:
        """Removes the files of these names: what they asked for is done."""
        for name in names:
            self.files[name].unlink(missing_ok=True)

    def release(self) -> None:
        """Removes the files and gives SIGTERM back to whom it belonged to."""
        self.done(self.files)
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
