"""What a run tells: one line of JSON per step logged, TensorBoard where it is installed, a progress bar.

metrics.jsonl: {"step": 120, "loss": 0.113, "rate": 0.0001, "seconds": 12.3}, and {"step": 100, "event": "resumed"}.
"""

import json
import time

from tqdm import tqdm


class Log:
    """Writes a run's figures into its folder and draws the bar."""

    def __init__(self, folder, start, steps, name):
        self.file = open(folder / "metrics.jsonl", "a", buffering=1)
        self.board = _board(folder)
        self.bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True, mininterval=0.5)
        self.began = time.monotonic()
        self.event(start, "resumed" if start else "started")

    def event(self, step, event, **more):
        """Writes one line about something that happened at a step."""
        self.file.write(json.dumps({"step": step, "event": event, **more}) + "\n")

    def metrics(self, step, values):
        """Writes the figures of a step, {name: number}, to the file, the board and the bar."""
        values = {name: float(f"{float(value):.7g}") for name, value in values.items()}
        seconds = round(time.monotonic() - self.began, 3)
        self.file.write(json.dumps({"step": step, **values, "seconds": seconds}) + "\n")
        for name, value in values.items():
            if self.board:
                self.board.add_scalar(name, value, step)
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)

    def advance(self, step):
        """Moves the bar to a step."""
        self.bar.update(step - self.bar.n)

    def close(self):
        """Closes the file, the board and the bar."""
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()


def _board(folder):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None  # the "logging" extra brings it
    return SummaryWriter(str(folder / "tensorboard"))
