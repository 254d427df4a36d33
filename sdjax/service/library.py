"""The names that requests may use: models, autoencoders, ControlNets and adapters in the server's folders.

    library = Library(place)
    library.find("model", "v1-5.safetensors [6ce0161689]").source       # what Maker loads
    library.described(entry)["words"]                                   # trigger words, from the file's own text

A name from outside is only compared with the names in this list.  The tensors' names decide a file's kind,
descriptions.py reads its metadata; both are cached by path, size and time.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.formats.adapters import attach, attachable, kinds
from sdjax.formats.storage import checkpoints, files
from sdjax.service import descriptions
from sdjax.service.place import Place
from sdjax.settings import SettingError
from sdjax.trees import listing

WHOLE = ("model", "vae", "controlnet")
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
WEIGHTS = (".safetensors", ".ckpt")  # kinds of whole models
CLASSES = {"ControlNetModel": "controlnet", "AutoencoderKL": "vae"}  # of diffusers' config.json
EVERY = 30.0  # seconds between searches for new files
MOST_NOTES, MOST_TAGS = 20_000, 50
BUILT_IN = ("pocket",)


@dataclass(frozen=True)
class Entry:
    """One model or adapter.

    name: its name in requests.  source: what the Maker loads: a path, a built-in name or a hub id.
    """

    kind: str
    name: str
    source: str
    path: Path | None = None

    @property
    def stem(self) -> str:
        """The name without folder and suffix."""
        return Path(self.name).stem if self.path is not None and self.path.is_file() else self.name


def known() -> tuple[str, ...]:
    """Returns all kinds of entries: the whole models, then adapters by their `called`."""
    return (*WHOLE, *dict.fromkeys(kind.called for kind in kinds.known().values() if kind.called))


class Library:
    """The entries in a place's folders; metadata is cached by path, size and time in place/library.json."""

    def __init__(self, place: Place) -> None:
        self.place, self.kept, self.lock = place, place.root / "library.json", threading.Lock()
        self.known: dict[str, Any] = self._read()
        self.saved = ""

    def _read(self) -> dict[str, Any]:
        try:
            return {key: value for key, value in files.read_json(self.kept).items() if isinstance(value, dict)}
        except ValueError:
            return {}

    def save(self) -> None:
        """Writes new metadata to the cache."""
        with self.lock:
            text = json.dumps(self.known)
            if text != self.saved:
                with files.new_file(self.kept) as temporary:
                    temporary.write_text(text)
                self.saved = text

    # ---- entries ---------------------------------------------------------------------------------

    def entries(self, *kinds: str) -> list[Entry]:
        """Returns the current entries of some kinds, or of all, by name."""
        every = known()
        found = {(one.kind, one.name): one for one in self._walk() if one.kind in (kinds or every)}
        return sorted(found.values(), key=lambda one: (every.index(one.kind), one.name.casefold()))

    @property
    def own(self) -> Entry:
        """The default model of requests."""
        name = self.place.model
        path = Path(name) if name not in BUILT_IN and Path(name).exists() else None
        return Entry("model", path.resolve().name if path else name, name, path)

    def _walk(self) -> Iterator[Entry]:
        yield self.own
        for name in BUILT_IN:
            yield Entry("model", name, name)
        for run in sorted((self.place.root / "runs").glob("*/export")):
            if (kind := _folder_kind(run)) is not None:
                yield Entry(kind, f"run {run.parent.name[:8]}", str(run), run)
        if self.place.models is not None:
            yield from self._models(self.place.models)
        yield from self._adapters(self.place.named)

    def _models(self, root: Path) -> Iterator[Entry]:
        for path in _visible(root):
            name = path.relative_to(root).as_posix()
            if path.is_dir():
                kind = self._once(path, "whole", _folder_kind)
            elif path.suffix.lower() in SUFFIXES and not (path.parent / "config.json").is_file():
                kind = self._once(path, "whole", _file_kind)
            else:
                continue
            if kind is not None:
                yield Entry(kind, name, str(path), path)

    def _adapters(self, root: Path) -> Iterator[Entry]:
        for path, names in attach.Folder(root).files.items():
            kind = self._once(path, "adapter", _adapter_kind)  # which may lie below the models
            if kind is not None:
                yield Entry(kind, names[0], str(path), path)

    def find(self, kind: str, name: str, setting: str = "") -> Entry:
        """Returns the entry of a name, with or without suffix and hash.

        Raises SettingError for `setting` if there is none.
        """
        there = self.entries(kind)
        plain = name.rpartition(" [")[0] if name.endswith("]") else name
        for one in there:
            if plain == one.name:
                return one
        for one in there:
            if plain in (one.stem, one.name.removesuffix(Path(one.name).suffix)) or name and name == self.hash(one):
                return one
        raise SettingError(setting or kind, name, f"one of {listing(self.title(one) for one in there)}")

    # ---- metadata ----------------------------------------------------------------------------------

    def title(self, entry: Entry) -> str:
        """Returns an entry's name and, once computed, its hash: "v1-5.safetensors [6ce0161689]"."""
        found = self.hash(entry)
        return f"{entry.name} [{found}]" if found else entry.name

    def hash(self, entry: Entry) -> str:
        """Returns the first 10 digits of an entry's SHA-256, "" before it is computed."""
        return str(self._kept(entry).get("sha256", ""))[:10]

    def known_of(self, entry: Entry) -> dict[str, Any]:
        """Returns the cached metadata of an entry, {} if there is none; see descriptions.of."""
        return dict(self._kept(entry).get("about") or {})

    def described(self, entry: Entry) -> dict[str, Any]:
        """Returns an entry's metadata; the first call may read gigabytes.  See descriptions.of."""
        if entry.path is None:
            return {}
        about = self._once(entry.path, "about", lambda path: descriptions.of(entry.kind, path))
        self._once(entry.path, "sha256", lambda path: about.get("hashes", {}).get("sha256", ""))
        return about

    def notes(self, entry: Entry) -> dict[str, Any]:
        """Returns the owner's {"notes": text, "tags": [text]} of an entry."""
        kept = self._notes().get(f"{entry.kind} {entry.name}")
        return kept if isinstance(kept, dict) else {"notes": "", "tags": []}

    def note(self, entry: Entry, notes: str, tags: list[str]) -> None:
        """Saves the owner's notes and tags of an entry.  Raises SettingError if they are too long."""
        if len(notes) > MOST_NOTES or len(tags) > MOST_TAGS or any(len(tag) > 100 for tag in tags):
            raise SettingError("notes", f"{len(notes)} letters", f"at most {MOST_NOTES} and {MOST_TAGS} tags")
        with self.lock, files.new_file(self.place.root / "notes.json") as temporary:
            kept = self._notes() | {f"{entry.kind} {entry.name}": {"notes": notes, "tags": tags}}
            temporary.write_text(json.dumps(kept))

    def _notes(self) -> dict[str, Any]:
        try:
            return files.read_json(self.place.root / "notes.json")
        except ValueError:
            return {}

    def describe_all(self, over: threading.Event) -> None:
        """Caches the metadata of all entries; ends early if `over` is set."""
        for one in self.entries():
            if over.is_set():
                return
            with contextlib.suppress(ValueError, OSError):
                self.described(one)
        self.save()

    def watch(self, over: threading.Event) -> None:
        """Runs in a thread: caches the metadata of all entries and of new ones until `over` is set."""
        while not over.is_set():
            self.describe_all(over)
            over.wait(EVERY)

    def _kept(self, entry: Entry) -> dict[str, Any]:
        if entry.path is None:
            return {}
        found = self.known.get(str(entry.path))
        return found if found and found.get("state") == _state(entry.path) else {}

    def _once(self, path: Path, name: str, find: Any) -> Any:
        """Returns find(path), cached by path, size and time."""
        state = _state(path)
        with self.lock:
            held = self.known.get(str(path))
            if not held or held.get("state") != state:
                held = self.known[str(path)] = {"state": state}
        if name not in held:
            found = find(path)
            with self.lock:
                held[name] = found
        return held[name]


def _visible(root: Path) -> Iterator[Path]:
    """Yields folders and files below a folder by name; does not enter the folder of a model."""
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        yield path
        if path.is_dir() and _folder_kind(path) is None:
            yield from _visible(path)


def _state(path: Path) -> list[int]:
    try:
        state = path.stat()
    except OSError:
        return []
    return [state.st_size if path.is_file() else 0, state.st_mtime_ns]


def _folder_kind(path: Path) -> str | None:
    """Returns the kind of a diffusers folder."""
    if (path / "model_index.json").is_file():
        return "model"
    try:
        return CLASSES.get(files.read_json(path / "config.json").get("_class_name", ""))
    except ValueError:
        return None


def _file_kind(path: Path) -> str | None:
    """Returns the kind of a single file by its tensors' names, whose numbers are not read.

    For a pickle that our reader refuses, the name of the file decides, so that loading it can say why.
    """
    try:
        return descriptions.whole_kind(checkpoints.opened(path)[0].names)
    except (ValueError, OSError):
        if path.suffix.lower() == ".safetensors":
            return None
        return "vae" if ".vae." in path.name.lower() else "model" if path.suffix.lower() in WEIGHTS else None


def _adapter_kind(path: Path) -> str | None:
    """Returns `called` of an adapter file's format, None if it cannot be attached."""
    try:
        kind = attachable.kind(path)
    except (ValueError, OSError):
        return None
    return kind.called or None if kind is not None else None
