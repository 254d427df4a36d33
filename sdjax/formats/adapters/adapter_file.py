"""An adapter's file on disk: the header that tells its kind, and the content, read once.

file = of(Path("cat.safetensors"))
file.names, file.metadata          # from the header only
file.content                       # {name: array}, or a pickle's plain values and arrays
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdjax.formats.storage import pickles
from sdjax.formats.storage.tensor_file import TensorFile

PNG = b"\x89PNG"


@dataclass(frozen=True)
class File:
    """A file, or a folder that is one adapter, such as a model with an e4t/.

    names: tensor names from a safetensors header; () for a folder; None for a pickle or picture, which must be read.
    metadata: from a safetensors header.
    picture: whether it is a PNG.
    """

    path: Path
    names: tuple[str, ...] | None = ()
    metadata: dict[str, str] = field(default_factory=dict)
    picture: bool = False

    @functools.cached_property
    def content(self) -> Any:
        """{name: array} of safetensors, plain values and arrays of a pickle, None for a folder or picture.

        Pickles are read without running code.  Raises ValueError for a damaged file or another kind.
        """
        if self.path.is_dir() or self.picture:
            return None
        if self.names is None:
            return pickles.read(self.path)
        held = TensorFile(self.path)
        return {name: held.read(name) for name in held.names}

    @property
    def keys(self) -> tuple[Any, ...]:
        """The names of tensors, or the keys of the dict in a pickle; () for other content."""
        if self.names is not None:
            return self.names
        return tuple(self.content) if isinstance(self.content, dict) else ()


def of(path: Path) -> File:
    """Returns the File of a path; reads only the header of safetensors.

    Raises ValueError for a damaged header, OSError for a missing file.
    """
    if path.is_dir():
        return File(path)
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] != b"{":
        return File(path, None, picture=head.startswith(PNG))
    held = TensorFile(path)
    return File(path, tuple(held.names), held.metadata)
