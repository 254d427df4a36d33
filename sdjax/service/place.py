"""The server's folder and its contents, readable by the owner only.

place = Place(Path("outputs/ui"), models=Path("models")).made()
place.upload(name)                  # the file of an upload; ValueError for an unknown name
"""

import dataclasses
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"[0-9a-f]{32}(-\d{1,4})?\.(png|jpg|webp)")  # of uploads and pictures
KEY = re.compile(r"[0-9a-f]{32}")  # of jobs and sets of pictures
FOLDERS = ("pictures", "uploads", "sets", "runs", "trash")


@dataclass(frozen=True)
class Place:
    """Where a server's files lie, and what it may use.

    root: its own folder.  model: what pictures are made with unless a request says otherwise.  models, adapters:
    folders of what requests may name.  data: a folder of folders of pictures to train on.  dtype: of models.
    batch: pictures made at once.
    """

    root: Path
    model: str = "pocket"
    models: Path | None = None
    adapters: Path | None = None
    data: Path | None = None
    dtype: str = "float32"
    batch: int = 4

    def made(self) -> "Place":
        """Makes the folders and returns this."""
        for folder in (self.root, *(self.root / name for name in FOLDERS)):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        for left in (self.root / "uploads").glob(".*"):  # of a server that died while somebody sent it
            left.unlink(missing_ok=True)
        return self

    @property
    def queue(self) -> Path:
        """The file of the queue."""
        return self.root / "queue.db"

    @property
    def device(self) -> Path:
        """The file whose lock the process has that uses the device."""
        return self.root / "device.lock"

    @property
    def named(self) -> Path:
        """The folder of adapters that prompts name, which may not be there."""
        return self.adapters or self.root / "adapters"

    def picture(self, name: str) -> Path:
        """Returns the path of a picture.  Raises ValueError for what is no picture's name."""
        return self._file("pictures", name)

    def upload(self, name: str) -> Path:
        """Returns the path of an upload.  Raises ValueError for what is no upload's name."""
        return self._file("uploads", name)

    def _file(self, folder: str, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r}: expected a name that this server gave")
        return self.root / folder / name

    def run(self, key: str) -> Path:
        """Returns the folder of a training job.  Raises ValueError for what is no job's key."""
        return self._folder("runs", key)

    def set(self, key: str) -> Path:
        """Returns the folder of a set of pictures that was uploaded.  Raises ValueError for what is no set's key."""
        return self._folder("sets", key)

    def _folder(self, folder: str, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise ValueError(f"{key[:80]!r}: expected a key that this server gave")
        return self.root / folder / key

    def hidden(self, text: str) -> str:
        """Returns a text without the paths of the server's folders."""
        for folder in filter(None, (self.models, self.adapters, self.data, self.root)):
            text = text.replace(f"{folder}/", "").replace(str(folder), folder.name)
        return text

    def arguments(self) -> list[str]:
        """Returns the arguments that tell a worker this place."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]

    @classmethod
    def of(cls, arguments: list[str]) -> "Place":
        """Returns the place that arguments tell."""
        given = {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
        paths = {name: Path(value) for name, value in given.items() if name not in ("model", "dtype", "batch")}
        return cls(**{**given, **paths, "batch": int(given.get("batch", 4))})  # pyright: ignore[reportArgumentType]

    def command(self, *first: str) -> list[str]:
        """Returns the command line of a worker."""
        return [sys.executable, "-m", "sdjax.service.worker", *first, *self.arguments()]


def private() -> None:
    """Makes what this process writes readable by its owner alone."""
    os.umask(0o077)
