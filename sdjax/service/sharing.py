"""Packages entries of the library for sharing, and moves entries to the trash.

    package(entry, about, Path("ink.zip"), pictures=[Path("a.png")], licence="CC-BY-4.0")

A package is a zip with the file, pictures with their settings, and a card (README.md).  It omits private data unless
requested: prompts and file names in pictures, and the owner's folder names in the file's header.
"""

import contextlib
import secrets
import shutil
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdjax.formats.adapters.about import PRIVATE
from sdjax.formats.storage import files, headers
from sdjax.images import reading
from sdjax.service import descriptions, records
from sdjax.service.library import Entry, Library
from sdjax.settings import SettingError

BESIDE = (*descriptions.PREVIEWS, ".json", ".civitai.info")
MOST_PICTURES = 20


def package(
    entry: Entry,
    about: Mapping[str, Any],
    destination: Path,
    pictures: Sequence[Path] = (),
    licence: str = "",
    recipe: Mapping[str, Any] | None = None,
    private: bool = False,
) -> Path:
    """Writes an entry's zip, completely or not at all, and returns its path.

    about: its metadata, see descriptions.of.  recipe: the settings of the run that made it.
    private: True keeps prompts, file names and a trainer's metadata about the owner's folders.
    Raises SettingError for an entry without a file.
    """
    if entry.path is None:
        raise SettingError("name", entry.name, "a file or folder in the library")
    if len(pictures) > MOST_PICTURES:
        raise SettingError("pictures", len(pictures), f"at most {MOST_PICTURES}")
    with files.new_file(destination) as temporary, tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        files.ask_room(temporary, sum(path.stat().st_size for path, _ in _files(entry.path, private)))
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for path, name in _files(entry.path, private):
                archive.write(_shareable(path, Path(folder), private), name)
            shown = []
            for number, path in enumerate(pictures):
                shown.append((f"pictures/{number:02d}.png", _picture(path, Path(folder), private)))
                archive.write(shown[-1][1], shown[-1][0])
            archive.writestr("README.md", card(entry, about, [name for name, _ in shown], licence, recipe, private))
    return destination


def card(
    entry: Entry,
    about: Mapping[str, Any],
    pictures: Sequence[str] = (),
    licence: str = "",
    recipe: Mapping[str, Any] | None = None,
    private: bool = False,
) -> str:
    """Returns the card of an entry: base model, trigger words, training, licence, hashes."""
    words = [word for word, _ in about.get("words", [])]
    training = {name: value for name, value in about.get("training", {}).items() if private or name != "comment"}
    base, licence = (_line(text) or "unknown" for text in (about.get("base", ""), licence))
    lines = ["---", f"license: {licence}", f"base_model: {base}", "---", "", f"# {_line(entry.stem)}", ""]
    lines += [f"* kind: {entry.kind}", f"* base model: {base}", f"* licence: {licence}"]
    lines += [f"* trigger words: {_line(', '.join(words[:20])) or 'none'}"] if private or words else []
    lines += [f"* {name}: {_line(value)}" for name, value in about.get("hashes", {}).items()]
    if training or recipe:
        lines += ["", "## Training", ""]
        lines += [f"* {name}: {_line(value)}" for name, value in training.items()]
        lines += [f"* {_line(name)}: {_line(value)}" for name, value in (recipe or {}).items()]
    lines += ["", *(f"![]({name})" for name in pictures)] if pictures else []
    return "\n".join(lines) + "\n"


def _line(value: Any) -> str:
    return " ".join(str(value).split())[:500].replace("<", "&lt;")


def _files(path: Path, private: bool) -> list[tuple[Path, str]]:
    """Returns [(file, name in the package)] of an entry; a folder's preview, which shows prompts, only if private."""
    if path.is_file():
        return [(path, path.name)]
    inside = sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith("."))
    inside = [one for one in inside if private or one != path / headers.PREVIEW]
    return [(one, f"{path.name}/{one.relative_to(path).as_posix()}") for one in inside]


def _shareable(path: Path, folder: Path, private: bool) -> Path:
    """Returns a copy of a file without private metadata; its tensors, and so its AutoV3 hash, do not change."""
    if private or path.suffix != ".safetensors" and path.name != headers.NAME:
        return path
    told = files.read_json(path) if path.name == headers.NAME else headers.metadata(path)
    if not set(PRIVATE) & told.keys():
        return path
    kept = {name: value for name, value in told.items() if name not in PRIVATE}
    made = folder / f"{secrets.token_hex(8)}{path.suffix}"
    if path.name == headers.NAME:
        files.write_json(made, kept)
        return made
    shutil.copyfile(path, made)
    headers.tell(made, kept)
    return made


def _picture(path: Path, folder: Path, private: bool) -> Path:
    """Returns a copy of a picture to share: its pixels and its public settings."""
    made = folder / f"{secrets.token_hex(8)}.png"
    pixels = reading.picture(path)
    try:
        record = records.read(path)
    except ValueError:
        Image.fromarray(pixels).save(made)
        return made
    records.save(made, pixels, record, private=private, beside=False)
    return made


def discard(library: Library, entry: Entry) -> str:
    """Moves an entry's files into the place's trash folder and returns their name there.

    Raises SettingError for a built-in model and for the server's default model.
    """
    place, path = library.place, entry.path
    roots = [root.absolute() for root in (place.models, place.named, place.root / "runs") if root is not None]
    inside = path is not None and any(path.absolute().is_relative_to(root) for root in roots)
    own = library.own.path
    if path is None or not inside or own is not None and own.resolve() == path.resolve():
        raise SettingError("name", entry.name, "a file in the server's folders other than its default model")
    there = place.root / "trash" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    there.mkdir(mode=0o700)
    stem = path.with_suffix("") if path.is_file() else path
    for one in (path, *(stem.parent / f"{stem.name}{end}" for end in BESIDE)):
        if one.exists():
            with contextlib.suppress(FileNotFoundError):
                shutil.move(one, there / one.name)
    return there.name
