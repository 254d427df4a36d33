"""The reader of each kind of file, as the programs call it."""

import functools
import shutil
from pathlib import Path

import numpy as np
from fuzz.seed import small

import sdjax
from sdjax.data import sources
from sdjax.data.batches import Data
from sdjax.data.store import Store
from sdjax.formats.adapters import kinds
from sdjax.formats.models import autoencoder, controlnet, lpips
from sdjax.images import reading
from sdjax.service import lists, records
from sdjax.text.tokenizer import Tokenizer
from sdjax.training import export


@functools.cache
def model():
    """Returns the model that adapters are attached to."""
    return sdjax.load("random:tiny")


def attach(path: Path) -> None:
    """Attaches an adapter to a small model."""
    sdjax.attach(model(), path)


def load(path: Path) -> None:
    """Loads a model."""
    sdjax.load(path)


def control(path: Path) -> None:
    """Loads a ControlNet."""
    controlnet.load_control(path)


@functools.cache
def model_of_halves():
    """Returns the model whose autoencoder `vae` replaces; it halves the sides."""
    return small()


def vae(path: Path) -> None:
    """Puts another autoencoder into a model."""
    autoencoder.put(model_of_halves(), path)


def start(path: Path) -> None:
    """Opens the file that training starts from, init=."""
    kinds.opened(path, model())


def lpips_(path: Path) -> None:
    """Reads LPIPS' weights from one file or from all files of a folder."""
    lpips.read(",".join(map(str, sorted(path.iterdir()))) if path.is_dir() else path)


def single(path: Path) -> None:
    """Loads a single-file model with the tokenizer in the same folder."""
    sdjax.load(next(file for file in path.iterdir() if file.is_file()), tokenizer=path / "tokenizer")


def tokenizer(path: Path) -> None:
    """Loads a tokenizer and uses it."""
    Tokenizer.load(path)(["a photo of a cat"])


def run(path: Path) -> None:
    """Reads a run's settings and exports its newest checkpoint."""
    export.write(path, path.with_name(path.name + "-export"))
    shutil.rmtree(path.with_name(path.name + "-export"))


def list_(path: Path) -> None:
    """Reads a list of pictures; each row's error must be one line."""
    for error in lists.read(path, word=lambda: "word")[1]:
        if "\n" in error["error"]:
            raise AssertionError(f"row {error['row']} in several lines: {error['error'][:200]!r}")


def record(path: Path) -> None:
    """Reads a picture's record."""
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
        examples.shape(i)
        examples.example(i, 16, np.random.default_rng(0))


def cache(path: Path) -> None:
    """Reads every record of a data cache."""
    store = Store(path)
    for name in list(store.new):
        store.get(name)


READERS = {
    "attach": attach, "start": start, "load": load, "single": single, "control": control, "vae": vae, "lpips": lpips_,
    "tokenizer": tokenizer, "run": run, "list": list_, "record": record, "picture": picture, "mask": mask,
    "photos": photos, "cache": cache,
}  # fmt: skip
SLOW = ("load", "single", "run")  # readers that get a quarter of the others' damaged files
