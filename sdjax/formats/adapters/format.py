"""What a kind of adapter file is: known by its header, read into an Adapter, written, and started from.

    kind, adapter = opened("learned_embeds.safetensors", sd)      # Embedding(), its Adapter
    trained, frozen = kind.start(adapter, method, trained, frozen)
    kind.write(method.adapter(frozen, trained), Path("export"))

A new kind is a new file of this package, or of sdjax.formats where it reads networks too, found by walking (`known`).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import sdjax.formats.adapters
from sdjax.formats.adapters import reading
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method
from sdjax.runtime.members import members
from sdjax.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Header:
    """What tells a file's kind: its place, the names of its tensors and its metadata; of a folder only the place.

    names: None where the file has no header, so that only reading it all would tell (pickles, pictures).
    """

    path: Path
    names: tuple[str, ...] | None = ()
    metadata: dict[str, str] = field(default_factory=dict)


class Format(Protocol):
    """One kind of file; name: by which methods name it."""

    name: str = ""

    def matches(self, header: Header) -> bool:
        """Returns whether a file is of this kind."""
        ...

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether such a file can hold all of an adapter."""
        ...

    def read(self, file: Path, sd: StableDiffusion) -> Adapter:
        """Returns what a file brings to a model; raises ValueError naming the file and what does not fit."""
        ...

    def write(self, adapter: Adapter, folder: Path) -> Path:
        """Writes the file of an adapter into a folder and returns its path."""
        ...

    def start(
        self, adapter: Adapter, method: Method, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with what a file holds in place of what was drawn, for training to go on from.

        Raises SettingError for a setting of the method that is not the file's, ValueError for weights that do not fit.
        """
        ...

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines that say how a written file is used: here, in diffusers, in A1111; model: what it was for."""
        ...


def known() -> dict[str, Format]:
    """Returns {name: Format} of all kinds."""
    found = {**members(sdjax.formats.adapters, Format), **members(sdjax.formats, Format)}
    return {kind.name: kind for kind in (made() for made in found.values())}


def header(path: Path) -> Header:
    """Returns the Header of a file or folder.  Raises ValueError where there is none, or it is damaged."""
    if path.is_dir() and reading.chosen(path) is None:
        return Header(path)
    path = reading.locate(path)
    return Header(path, *reading.described(path))


def opened(source: str | Path, sd: StableDiffusion) -> tuple[Format, Adapter]:
    """Returns (kind, what it brings to sd) of a file or folder.

    Raises ValueError where it is of no known kind, or cannot be read.
    """
    found = header(Path(source))
    for kind in known().values():
        if kind.matches(found):
            return kind, kind.read(found.path, sd)
    said = f"of no kind that training starts from ({', '.join(known())}); a whole model is given as model="
    raise ValueError(f"init={str(source)!r}: {said}")
