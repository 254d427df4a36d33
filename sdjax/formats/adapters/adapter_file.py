"""An adapter's file as it lies on disk: what tells its kind, and what it holds, which is read once.

file = of(Path("cat.safetensors"))
file.names, file.metadata          # of the header alone
file.content                       # {name: array}; of a pickle the plain values and arrays that it holds
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
    """A file, or a folder that is one thing: a model with an e4t/.

    names: of the tensors in a safetensors header, () of a folder; None for a file whose content alone tells.
    metadata: of a safetensors header.
    picture: whether it is a PNG.
    """

    path: Path
    names: tuple[str, ...] | None = ()
    metadata: dict[str, str] = field(default_factory=dict)
    picture: bool = False

    @functools.cached_property
    def content(self) -> Any:
        """{name: array} of safetensors, plain values and arrays of a pickle, None of a folder or picture.

        Pickles are read without running code.  Raises ValueError for a file that is damaged or neither of these.
        """
        if self.path.is_dir() or self.picture:
            return None
        if self.names is None:
            return pickles.read(self.path)
        held = TensorFile(self.path)
        return {name: held.read(name) for name in held.names}

    @property
    def keys(self) -> tuple[Any, ...]:
        """The names of tensors, or the keys of the dict in a pickle; () where there are none."""
        if self.names is not None:
            return self.names
        return tuple(self.content) if isinstance(self.content, dict) else ()


def of(path: Path) -> File:
    """Returns the File of a path; of safetensors the header is read.

    Raises ValueError where that is damaged, OSError where there is no such file.
    """
    if path.is_dir():
        return File(path)
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] != b"{":
        return File(path, None, picture=head.startswith(PNG))
    held = TensorFile(path)
    return File(path, tuple(held.names), held.metadata)
