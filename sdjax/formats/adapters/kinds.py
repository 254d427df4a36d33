"""All adapter formats: their names, tags and endings, and the format of a file or folder.

kind, adapter = opened("learned_embeds.safetensors", sd)      # LearnedEmbeds(), its Adapter
trained, frozen = kind.start(adapter, method, trained, frozen)
kind.write(method.adapter(frozen, trained), Path("export"), {"modelspec.title": "cat"})
"""

import functools
from dataclasses import replace
from pathlib import Path

import sdjax.formats.adapters
from sdjax.formats.adapters import adapter_file
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.storage import files
from sdjax.formats.storage.files import HUB_ID
from sdjax.methods.adapter import Adapter
from sdjax.runtime.guard import named
from sdjax.runtime.members import members
from sdjax.stable_diffusion import StableDiffusion

SETTINGS = ("adapter_config.json",)  # PEFT's file beside the weights


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
        kind = recognised(adapter_file.of(path))
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
    """Returns the adapter file or adapter folder of a hub id "owner/name", or None if it has none with a usual name.

    Raises ValueError naming an id without a repository.
    """
    names = [name for kind in known().values() for name in (*kind.hub, *kind.filling)]
    folder = files.locate(source, [[*names, *SETTINGS]], lambda folder: True)
    whole = folder.is_dir() and recognised(adapter_file.of(folder))  # without a matching file there is no folder
    return chosen(folder) or (folder if whole else None)


def given(source: str | Path) -> Path:
    """Returns the absolute path of an adapter that a user names: a path, or a text "owner/name" fetched from the hub.

    Never for names from prompts or files, which must not reach a host.
    Raises ValueError for anything else.
    """
    if not is_hub_id(source):
        return locate(source)
    found = fetched(str(source))
    if found is None:
        there = ", ".join(folder_names())
        raise ValueError(f"{source}: no such file, and the hub's repository has no adapter; expected {there} in it")
    return found


def is_hub_id(source: str | Path) -> bool:
    """Returns whether a text, and not a path, means a repository on the hub; with a file's ending it means a file."""
    if not isinstance(source, str) or not HUB_ID.fullmatch(source) or Path(source).exists():
        return False
    return not source.lower().endswith(endings())


def opened(source: str | Path, sd: StableDiffusion) -> tuple[Format, Adapter]:
    """Returns (format, adapter) of a file or folder, for training to start from.

    Raises ValueError if it is unreadable or unknown.
    """
    path = Path(source)
    file = adapter_file.of(path if path.is_dir() and chosen(path) is None else locate(path))
    try:
        kind = kind_of(file)
    except ValueError as error:
        raise ValueError(f"init={str(source)!r}: {error}; a whole model is given as model=") from None
    with named(file.path):
        return kind, replace(kind.read(file, sd), family=sd.family)
