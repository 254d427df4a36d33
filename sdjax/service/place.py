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

NAME = re.compile(r"[0-9a-f]{32}(-\d{1,4})?\.(png|jpg|webp)")  # names of uploads and pictures
KEY = re.compile(r"[0-9a-f]{32}")  # keys of jobs and picture sets
FOLDERS = ("pictures", "uploads", "sets", "runs", "trash")


@dataclass(frozen=True)
class Place:
    """A server's folders and defaults.

    root: its own folder.  model: the default model.  models, adapters: folders with the files that requests may name.
    data: a folder whose subfolders hold training pictures.  dtype: data type of models.  batch: pictures computed at
    once.
    """

    root: Path
    model: str = "pocket"
    models: Path | None = None
    adapters: Path | None = None
    data: Path | None = None
    dtype: str = "float32"
    batch: int = 4

    def made(self) -> "Place":
        """Creates the folders and returns self."""
        for folder in (self.root, *(self.root / name for name in FOLDERS)):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        for left in (self.root / "uploads").glob(".*"):  # left by a server that died during an upload
            left.unlink(missing_ok=True)
        return self

    @property
    def queue(self) -> Path:
        """The file of the queue's database."""
        return self.root / "queue.db"

    @property
    def device(self) -> Path:
        """The lock file of the process that uses the device."""
        return self.root / "device.lock"

    @property
    def named(self) -> Path:
        """The folder of adapters that prompts name; it may not exist."""
        return self.adapters or self.root / "adapters"

    def picture(self, name: str) -> Path:
        """Returns the path of a picture.  Raises ValueError for an invalid name."""
        return self._file("pictures", name)

    def upload(self, name: str) -> Path:
        """Returns the path of an upload.  Raises ValueError for an invalid name."""
        return self._file("uploads", name)

    def _file(self, folder: str, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r}: expected a name from this server")
        return self.root / folder / name

    def run(self, key: str) -> Path:
        """Returns the folder of a training job.  Raises ValueError for an invalid key."""
        return self._folder("runs", key)

    def set(self, key: str) -> Path:
        """Returns the folder of an uploaded picture set.  Raises ValueError for an invalid key."""
        return self._folder("sets", key)

    def _folder(self, folder: str, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise ValueError(f"{key[:80]!r}: expected a key from this server")
        return self.root / folder / key

    def hidden(self, text: str) -> str:
        """Returns a text without the paths of the server's folders."""
        for folder in filter(None, (self.models, self.adapters, self.data, self.root)):
            text = text.replace(f"{folder}/", "").replace(str(folder), folder.name)
        return text

    def arguments(self) -> list[str]:
        """Returns the command-line arguments of a worker for this place."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]

    @classmethod
    def of(cls, arguments: list[str]) -> "Place":
        """Returns the place of a worker's arguments."""
        given = {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
        paths = {name: Path(value) for name, value in given.items() if name not in ("model", "dtype", "batch")}
        return cls(**{**given, **paths, "batch": int(given.get("batch", 4))})  # pyright: ignore[reportArgumentType]

    def command(self, *first: str) -> list[str]:
        """Returns the command line of a worker."""
        return [sys.executable, "-m", "sdjax.service.worker", *first, *self.arguments()]


def private() -> None:
    """Makes files that this process creates readable by their owner only."""
    os.umask(0o077)
