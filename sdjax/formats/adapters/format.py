"""The contract of an adapter format: it recognises, reads and writes files, and training starts from them.

    kind, adapter = opened("learned_embeds.safetensors", sd)      # Embedding(), its Adapter
    trained, frozen = kind.start(adapter, method, trained, frozen)
    kind.write(method.adapter(frozen, trained), Path("export"), {"modelspec.title": "cat"})

A new format is a new file in this package (in sdjax.formats if it also reads networks); `known` finds it.  Then attach,
prompts such as <bias:NAME:0.5>, programs, records, exports and training use it.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import sdjax.formats.adapters
from sdjax.formats.adapters import file as files
from sdjax.formats.adapters.file import File
from sdjax.formats.storage import files as hub
from sdjax.formats.storage import hashes
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method
from sdjax.runtime.guard import named
from sdjax.runtime.members import members
from sdjax.stable_diffusion import StableDiffusion


class Format(Protocol):
    """One format.

    name: its name in the `formats` of methods.
    called: its name in records, notes and errors, such as "lora"; several formats may share one.  "" for a format that
    cannot be attached because only training understands it.
    tags: prefixes in prompts, <lora:NAME:0.8>; () if prompts name such files by their word alone.
    suffixes: endings of its files.  filling: file names that other programs use inside a folder of its own.
    last: try this format after the others, because it accepts almost any file.
    listed: the key in A1111's text under which records list hashes of such files; "" for "Name hashes".
    hub: names of its files in a hub repository; () for a format without repositories.
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
        """Returns whether a file has this format.  An error it raises is reported if no other format matches."""
        ...

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the adapter in a file; raises ValueError naming the file and what does not fit."""
        ...

    def acts(self, adapter: Adapter, sd: StableDiffusion) -> Adapter:
        """Returns the adapter in the form that `attach` uses, if that differs from the form for training."""
        return adapter

    def digest(self, path: Path) -> str:
        """Returns the hash in records: AutoV3, 12 hex digits, of the tensors or of another kind of file.

        A folder has sdjax's own hash, see hashes.of_folder.
        """
        return hashes.of_folder(path) if path.is_dir() else hashes.autov3(path)

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether this format can hold all of an adapter; False for read-only formats."""
        return False

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes an adapter into a folder and returns the path of the file.

        about: metadata for the file's header, see about.py; "ss_output_name" is the file's name.
        """
        raise ValueError(f"{folder}: sdjax reads the format {self.name} but does not write it")

    def brings(self, adapter: Adapter, sd: StableDiffusion) -> StableDiffusion:
        """Returns sd with the additional parts of a file, for training to start from."""
        return sd

    def start(
        self, adapter: Adapter, method: Method, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the file's weights as initial values.

        Raises SettingError for a method's setting that differs from the file's, ValueError for weights that do not fit.
        """
        raise ValueError(f"training cannot start from the format {self.name}")

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on the use of a written file here, in diffusers and in A1111; model: its base model."""
        return [f"here       sdjax text2img --model {model} --adapter {path}"]


def known() -> dict[str, Format]:
    """Returns {name: Format} of all formats, those with `last` at the end."""
    found = {**members(sdjax.formats.adapters, Format), **members(sdjax.formats, Format)}
    kinds = [made() for made in found.values()]
    return {kind.name: kind for kind in sorted(kinds, key=lambda kind: kind.last)}


@functools.cache  # asked for every picture of a list
def tags() -> dict[str, str]:
    """Returns {prefix in prompts: `called` of its format}: {"lora": "lora", "lyco": "lora", ...}."""
    return dict(sorted((tag, kind.called) for kind in known().values() for tag in kind.tags))


def endings(tagged: bool = False) -> tuple[str, ...]:
    """Returns the endings of attachable files; tagged: only of formats with a prefix in prompts."""
    kinds = [kind for kind in known().values() if kind.called and (kind.tags or not tagged)]
    return tuple(dict.fromkeys(suffix for kind in kinds for suffix in kind.suffixes))


def folder_names() -> list[str]:
    """Returns the names of files that fill a folder of their own, by preference."""
    names = [name for kind in known().values() for name in kind.filling]
    return sorted(names, key=lambda name: not name.endswith(".safetensors"))


def chosen(folder: Path) -> Path | None:
    """Returns the adapter file in a folder of another program, or None."""
    return next((folder / name for name in folder_names() if (folder / name).is_file()), None)


def locate(source: str | Path) -> Path:
    """Returns the absolute path of an adapter file or adapter folder.  Raises ValueError for anything else."""
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
    """Returns the format of a file, or None; raises ValueError if an error prevented the detection."""
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
    """Returns the format of a file.  Raises ValueError naming a file that is damaged or unknown."""
    kind = recognised(file)
    if kind is None:
        raise ValueError(f"{file.path}: of no known kind; expected one of {', '.join(known())}")
    return kind


def fetched(source: str) -> Path | None:
    """Returns the folder of a hub id "owner/name" with a known format, or None.

    Raises ValueError naming an id without a repository.
    """
    patterns = [[name for kind in known().values() for name in kind.hub]]
    folder = hub.locate(source, patterns, lambda folder: True)
    return folder if recognised(files.of(folder)) else None


def opened(source: str | Path, sd: StableDiffusion) -> tuple[Format, Adapter]:
    """Returns (format, adapter) of a file or folder, for training to start from.

    Raises ValueError if it is unreadable or unknown.
    """
    path = Path(source)
    file = files.of(path if path.is_dir() and chosen(path) is None else locate(path))
    try:
        kind = kind_of(file)
    except ValueError as error:
        raise ValueError(f"init={str(source)!r}: {error}; a whole model is given as model=") from None
    with named(file.path):
        return kind, replace(kind.read(file, sd), family=sd.family)
