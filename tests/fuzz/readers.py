"""What reads each kind of file, as the programs do."""

import functools
from pathlib import Path

import numpy as np
from adapter_files import made

import sdjax
from sdjax.data import sources
from sdjax.data.batches import Data
from sdjax.images import reading
from sdjax.service import lists, records
from sdjax.text.tokenizer import Tokenizer
from sdjax.training import export, loop


def attach(path: Path) -> None:
    """Attaches an adapter to a small model."""
    sdjax.attach(made("sd1")[1], path)


def load(path: Path) -> None:
    """Loads a model."""
    sdjax.load(path)


def single(path: Path) -> None:
    """Loads a model of one file, which is in a folder with a tokenizer."""
    sdjax.load(next(file for file in path.iterdir() if file.is_file()), tokenizer=path / "tokenizer")


def tokenizer(path: Path) -> None:
    """Loads a tokenizer and uses it."""
    Tokenizer.load(path)(["a photo of a cat"])


def run(path: Path) -> None:
    """Reads a run's settings and writes what its newest checkpoint holds."""
    export.write(path, path.with_name(path.name + "-export"))


def list_(path: Path) -> None:
    """Reads a list of pictures; an error of a row is a row of the second list."""
    lists.read(path, word=lambda: "word")


def record(path: Path) -> None:
    """Reads what made a picture."""
    records.read(path)


def picture(path: Path) -> None:
    """Reads a picture's pixels."""
    reading.picture(path)


def mask(path: Path) -> None:
    """Reads a mask."""
    reading.mask(path)


def photos(path: Path) -> None:
    """Opens a folder of training pictures and reads each with its caption and mask."""
    examples = sources.open(Data(path=str(path), mask=True))
    for i in range(len(examples)):
        examples.example(i, 16, np.random.default_rng(0))


READERS = {
    "attach": attach, "load": load, "single": single, "tokenizer": tokenizer, "run": run, "list": list_,
    "record": record, "picture": picture, "mask": mask, "photos": photos,
}  # fmt: skip


@functools.cache
def ready() -> None:
    """Imports and compiles what the first file would otherwise pay for."""
    made("sd1")
    loop.Train()
