"""What a kind of adapter file is: recognised, read into an Adapter, attached under a name, written, and started from.

    kind, adapter = opened("learned_embeds.safetensors", sd)      # Embedding(), its Adapter
    trained, frozen = kind.start(adapter, method, trained, frozen)
    kind.write(method.adapter(frozen, trained), Path("export"), {"modelspec.title": "cat"})

A new kind is a new file of this package, or of sdjax.formats where it reads networks too, found by walking (`known`):
from then on `attach`, prompts, as <bias:NAME:0.5>, programs, records, exports and training know it.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import sdjax.formats.adapters
from sdjax.formats.adapters import file as files
from sdjax.formats.adapters.file import File
from sdjax.formats.storage import files as hub
from sdjax.formats.storage import hashes
from sdjax.formats.storage.guard import named
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method
from sdjax.runtime.members import members
from sdjax.stable_diffusion import StableDiffusion


class Format(Protocol):
    """One kind of file.

    name: by which methods name it in `formats`.
    called: what records, notes and errors call it, "lora"; several layouts may share one.  "" where a file of this
    kind cannot be attached to a model, because only training knows what it means.
    tags: words before the name in prompts, <lora:NAME:0.8>; () for a kind that prompts name by its word alone.
    suffixes: endings of its files.  filling: names that other programs give it in a folder of its own.
    last: it is asked after the others, since it takes what may be anything.
    listed: the word of A1111's text under which records list hashes of such files; "" for "Name hashes".
    hub: names of the files of a repository of the hub that is such a folder; () for a kind of which there are none.
    """

    name: Any = ""
    called: Any = ""
    tags: Any = ()
    suffixes: Any = (".safetensors",)
    filling: Any = ()
    last: Any = False
    listed: Any = ""
    hub: Any = ()

    def matches(self, file: File) -> bool:
        """Returns whether a file is of this kind.  What it raises counts where no other kind takes the file."""
        ...

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns what a file brings to a model; raises ValueError naming the file and what does not fit."""
        ...

    def acts(self, adapter: Adapter, sd: StableDiffusion) -> Adapter:
        """Returns what was read as it acts on a model that it is attached to, where training reads it otherwise."""
        return adapter

    def digest(self, path: Path) -> str:
        """Returns the hash that records list, AutoV3: 12 hex digits of the tensors', or of a whole other file.

        Of a folder ours, see hashes.of_folder.
        """
        return hashes.of_folder(path) if path.is_dir() else hashes.autov3(path)

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether such a file can hold all of an adapter; False for a kind that is only read."""
        return False

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes the file of an adapter that it holds into a folder and returns its path.

        about: metadata for the header of the file, text by name, see about.py; "ss_output_name" is what to call it.
        """
        raise ValueError(f"{folder}: files of the kind {self.name} are only read")

    def brings(self, adapter: Adapter, sd: StableDiffusion) -> StableDiffusion:
        """Returns the model that training starts from: sd with the parts that a file brings along, before the split."""
        return sd

    def start(
        self, adapter: Adapter, method: Method, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with what a file holds in place of what was drawn, for training to go on from.

        Raises SettingError for a setting of the method that is not the file's, ValueError for weights that do not fit.
        """
        raise ValueError(f"training does not start from the kind {self.name}")

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines that say how a written file is used: here, in diffusers, in A1111; model: what it was for."""
        return [f"here       sdjax text2img --model {model} --adapter {path}"]


def known() -> dict[str, Format]:
    """Returns {name: Format} of all kinds, those that are asked last at the end."""
    found = {**members(sdjax.formats.adapters, Format), **members(sdjax.formats, Format)}
    kinds = [made() for made in found.values()]
    return {kind.name: kind for kind in sorted(kinds, key=lambda kind: kind.last)}


def tags() -> dict[str, str]:
    """Returns {word before a name in prompts: what its kind is called}: {"lora": "lora", "lyco": "lora", ...}."""
    return dict(sorted((tag, kind.called) for kind in known().values() for tag in kind.tags))


def endings(tagged: bool = False) -> tuple[str, ...]:
    """Returns the endings of files that can be attached; tagged: only of kinds that prompts name by a tag."""
    kinds = [kind for kind in known().values() if kind.called and (kind.tags or not tagged)]
    return tuple(dict.fromkeys(suffix for kind in kinds for suffix in kind.suffixes))


def folder_names() -> list[str]:
    """Returns the names of the files that fill a folder of their own, in the order in which one is chosen."""
    names = [name for kind in known().values() for name in kind.filling]
    return sorted(names, key=lambda name: not name.endswith(".safetensors"))


def chosen(folder: Path) -> Path | None:
    """Returns the file of a folder that another program filled with one adapter, None where there is none."""
    return next((folder / name for name in folder_names() if (folder / name).is_file()), None)


def locate(source: str | Path) -> Path:
    """Returns the whole path of an adapter's file, or of a folder that is one.  Raises ValueError for any other."""
    path = Path(source).resolve()
    if path.is_dir():
        found = chosen(path)
        if found is not None:
            return found
        kind = recognised(files.of(path))
        if kind is None or not kind.called:
            raise ValueError(f"{source}: a folder without {', '.join(folder_names())}")
        return path
    if not path.is_file():
        raise ValueError(f"{source}: no such file")
    return path


def recognised(file: File) -> Format | None:
    """Returns the kind of a file, None where it is of none; raises ValueError for what kept every kind from telling."""
    trouble = None
    with named(file.path):
        for kind in known().values():
            try:
                if kind.matches(file):
                    return kind
            except (ValueError, OSError) as error:
                trouble = trouble or error
        if trouble:
            raise trouble
    return None


def kind_of(file: File) -> Format:
    """Returns the kind of a file.  Raises ValueError naming it where it is damaged or of none that we know."""
    kind = recognised(file)
    if kind is None:
        raise ValueError(f"{file.path}: of no known kind; expected one of {', '.join(known())}")
    return kind


def fetched(source: str) -> Path | None:
    """Returns the folder of a hub id "owner/name" that is of a known kind, None where it is of none.

    Raises ValueError naming the id where there is no such repository.
    """
    patterns = [[name for kind in known().values() for name in kind.hub]]
    folder = hub.locate(source, patterns, lambda folder: True)
    return folder if recognised(files.of(folder)) else None


def opened(source: str | Path, sd: StableDiffusion) -> tuple[Format, Adapter]:
    """Returns (kind, what it brings to sd) of a file, or of a folder, for training to start from.

    Raises ValueError where it is of no known kind, or cannot be read.
    """
    path = Path(source)
    file = files.of(path if path.is_dir() and chosen(path) is None else locate(path))
    try:
        kind = kind_of(file)
    except ValueError as error:
        raise ValueError(f"init={str(source)!r}: {error}; a whole model is given as model=") from None
    with named(file.path):
        return kind, replace(kind.read(file, sd), family=sd.family)
