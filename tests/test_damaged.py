"""Damaged files, made by mutating valid ones: each is read, or refused in one line that names it."""

from pathlib import Path

import pytest

import sdjax
from sdjax.images import reading
from sdjax.runtime.guard import named
from sdjax.service import lists, records

FOLDER = Path(__file__).parent / "data" / "damaged"


def pixels(path):
    """Reads a picture that is learned, and the record in it."""
    try:
        records.read(path)
    except ValueError as error:
        assert path.name in str(error) and "\n" not in str(error)
    reading.picture(path)


READERS = {
    "attach": lambda path: sdjax.attach(sdjax.load("random:tiny"), path),
    "ckpt": lambda path: sdjax.load(path),
    "jobs": lambda path: lists.read(path),
    "recs": lambda path: records.read(path),
    "pics": pixels,
}
FILES = [path.name for path in sorted(FOLDER.iterdir()) if path.name.partition("-")[0] in READERS]


@pytest.mark.parametrize("name", FILES)
def test_one_line_that_names_the_file(name):
    try:
        READERS[name.partition("-")[0]](FOLDER / name)
    except (ValueError, OSError) as error:
        assert name in str(error) and "\n" not in str(error)


def test_there_are_as_many_as_were_found():
    assert len(FILES) == 33


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("weight"), "cat.pt: cannot be read: 'weight'"),
        (AssertionError(), "cat.pt: cannot be read: AssertionError"),
        (OSError("cut\noff"), "cat.pt: cannot be read: cut off"),
        (ValueError("rank 0"), "cat.pt: rank 0"),
        (ValueError("cat.pt: rank 0"), "cat.pt: rank 0"),
        (RecursionError("in\ncat.pt"), "in cat.pt"),
    ],
)
def test_the_guard(error, line):
    with pytest.raises(ValueError) as caught, named("cat.pt"):
        raise error
    assert str(caught.value) == line
