"""The files of a data set's splits: train, validation, test.

    files("photos", (".parquet",))                # the split "train"
    files("photos#validation", (".parquet",))

A file's or folder's name gives the split: train-00000-of-00002.parquet, data/test-0.tar, validation/0000.parquet.
Files without one are "train".  A path to one file, a pattern or a range takes all of its files.
Source: Hugging Face's documentation of dataset repositories, "File names and splits".
"""

import re
from pathlib import Path, PurePosixPath

from sdjax.data import places
from sdjax.data.places import File
from sdjax.settings import SettingError

NAMES = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
WORD = re.compile(rf"(?:^|[^a-z])({'|'.join(NAMES)})(?=[^a-z]|$)")
NUMBERED = re.compile(r"(\w[\w.]*)-\d{5}-of-\d{5}")  # the hub's file names, for any split


def parted(path: str) -> tuple[str, str]:
    """Returns (path, split) of "PATH#SPLIT"; the split is "" if the path names none."""
    if "#" not in path or (not places.remote(path) and Path(path).exists()):
        return path, ""
    path, _, split = path.rpartition("#")
    return path, NAMES.get(split, split)


def beside(path: str, other: str) -> str:
    """Returns the path of another split of the same data: "photos#test" for "photos#train" and "#test"."""
    return parted(path)[0] + other


def matches(path: str, endings: tuple[str, ...]) -> bool:
    """Returns whether a path names files with these endings, or a folder with such files and no pictures."""
    place = parted(path)[0]
    if places.NUMBERS.search(place):
        return place.lower().endswith(endings)
    if place.lower().endswith(endings):
        return places.remote(place) or bool(places.listed(place, endings))
    return places.holds(place, endings)


def files(path: str, endings: tuple[str, ...]) -> list[File]:
    """Returns the files of a path's split, sorted; without a split the files of "train", or of the only split.

    Raises SettingError for a path without files, and for a missing split.
    """
    place, split = parted(path)
    found = places.listed(place, endings)
    if not found:
        raise SettingError("path", path, f"{' or '.join(endings)} files; there are none")
    if place.lower().endswith(endings) and not split:
        return found
    names = [of(_below(file.path, place)) for file in found]
    there = sorted(set(names))
    wanted = split or ("train" if "train" in there else there[0] if len(there) == 1 else "")
    if wanted not in there:
        raise SettingError("path", path, f"a split after '#': {', '.join(there)}")
    return [file for file, name in zip(found, names, strict=True) if name == wanted]


def of(name: str) -> str:
    """Returns the split in a file's name, else in the nearest folder's name, else "train"."""
    path = PurePosixPath(name)
    for part in (path.name, *reversed(path.parent.parts)):
        if (numbered := NUMBERED.match(part)) and numbered[1] != "data":  # save_to_disk names every file data-...
            return NAMES.get(numbered[1], numbered[1])
        if word := WORD.search(part.lower()):
            return NAMES[word[1]]
    return "train"


def _below(path, root):
    """Returns a file's path relative to the path that the user gave."""
    return path[len(root) :].lstrip("/") if path.startswith(root) else path
