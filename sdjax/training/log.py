"""A run's log: one line of JSON per logged step, TensorBoard and wandb if installed, a progress bar.

metrics.jsonl: {"step": 120, "loss": 0.113, "rate": 0.0001, "seconds": 12.3}, and {"step": 100, "event": "resumed"}.
"""

import collections
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from sdjax.formats.storage import files
from sdjax.runtime import processes

MEAN = 50  # number of losses whose mean the bar shows
SHOWN = ("validation", "clip-i", "clip-t")  # the bar shows the last values of these metrics
WANDB_ID = "wandb.id"  # a file in the run's folder
INSTALL = "pip install -e '.[logging]'"


class Board(Protocol):
    """A dashboard for metrics and pictures of a run."""

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Shows the figures of a step."""

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Shows a picture uint8 [H W 3]."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Metrics and pictures in RUN/tensorboard."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Shows the figures of a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Shows a picture uint8 [H W 3]."""
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self.writer.close()


class Wandb:
    """Metrics and pictures in a Weights & Biases project; a resumed run continues there."""

    def __init__(self, folder: Path, project: str, settings: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # of the extra `logging` alone

        self.module = wandb
        name, number = folder.absolute().name, _wandb_id(folder)
        self.run = wandb.init(project=project, name=name, dir=str(folder), config=settings, id=number, resume="allow")

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Shows the figures of a step."""
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Shows a picture uint8 [H W 3]."""
        self.run.log({name: self.module.Image(picture)}, step=step)

    def close(self) -> None:
        """Writes what is left."""
        self.run.finish()


def _wandb_id(folder):
    """Returns a run's random id in its project, which is kept in the run's folder."""
    place = folder / WANDB_ID
    if not place.is_file():
        with files.new_file(place) as temporary:
            temporary.write_text(secrets.token_hex(8))
    return place.read_text().strip()


def boards(folder: Path, project: str, settings: dict[str, Any]) -> list[Board]:
    """Returns TensorBoard if installed, and wandb if the run names a project.

    Raises ValueError if the run needs wandb and it is not installed.
    """
    found: list[Board] = []
    try:
        found.append(TensorBoard(folder))
    except ImportError:
        print(f"no TensorBoard: {INSTALL}")
    if project:
        try:
            found.append(Wandb(folder, project, settings))
        except ImportError:
            raise ValueError(f"wandb={project!r}: not installed; {INSTALL}") from None
    return found


def of_run(folder: Path, start: int, steps: int, wandb: str, settings: dict[str, Any]) -> "Log":
    """Returns the log of a run that starts at a step; of several processes, only process 0 writes one.

    wandb: a project or "".  settings: the run's settings, for wandb.
    """
    if not processes.first():
        return Log(None, start, steps, folder.name)
    return Log(folder, start, steps, folder.name, boards(folder, wandb, settings))


def _torn(path: Path) -> bool:
    """Returns whether a file ends in the middle of a line, as after a full disk."""
    with open(path, "rb") as file:
        return file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"


class Log:
    """Writes a run's metrics into its folder and boards, and draws the progress bar; does nothing without a folder."""

    def __init__(self, folder: Path | None, start: int, steps: int, name: str, boards: Sequence[Board] = ()) -> None:
        self.file = open(folder / "metrics.jsonl" if folder else os.devnull, "a", buffering=1)
        if folder and _torn(folder / "metrics.jsonl"):
            self.file.write("\n")
        self.boards, self.losses = boards, collections.deque(maxlen=MEAN)
        self.last: dict[str, str] = {}
        self.bar = tqdm(
            total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True, mininterval=0.5, disable=not folder
        )
        self.began = time.monotonic()
        self.event(start, "resumed" if start else "started")

    def event(self, step: int, event: str, **more: Any) -> None:
        """Writes a line about an event at a step."""
        self.file.write(json.dumps({"step": step, "event": event, **more}) + "\n")

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of a step, {name: number}, to the file and the boards."""
        values = {name: float(f"{float(value):.7g}") for name, value in values.items()}
        self.last |= {name: f"{values[name]:.4g}" for name in SHOWN if name in values}
        seconds = round(time.monotonic() - self.began, 3)
        self.file.write(json.dumps({"step": step, **values, "seconds": seconds}) + "\n")
        for board in self.boards:
            board.figures(step, values)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Shows a picture uint8 [H W 3] on the boards."""
        for board in self.boards:
            board.picture(step, name, picture)

    def advance(self, step: int, loss: float | None = None) -> None:
        """Moves the bar to a step.  loss: added to the last MEAN losses; the bar shows their mean."""
        if loss is not None:
            self.losses.append(loss)
            self.bar.set_postfix({"loss": f"{np.mean(self.losses):.4g}", **self.last}, refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Closes the file, the boards and the bar."""
        self.bar.close()
        for board in self.boards:
            board.close()
        self.file.close()
