"""The interface of a condition: a picture for a ControlNet, computed from a picture or read from a file.

    canny = conditions.of("canny:low=50")
    edges = canny.make(picture)                        # uint8 [H W 3]
    skeleton = conditions.of("openpose").read("pose.json")

Training (data.condition), sampling (--preprocess) and Python use the same code.
"""

from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import UInt8

from sdjax.images import reading
from sdjax.images.reading import Held


class Condition(Protocol):
    """A frozen dataclass of settings, one per file of this package; this class is its base.

    name: its name in data.condition and --preprocess.  kind: a short description.
    endings: endings of its file next to a training picture, by preference; () if it is computed from the picture.
    mirrors: whether it may be mirrored with its picture; False if its colours tell left from right.
    private: settings that name files or models; only the user who starts a program may set them.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # tells type checkers that it is a dataclass
    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    endings: ClassVar[tuple[str, ...]] = ()
    mirrors: ClassVar[bool] = True
    private: ClassVar[tuple[str, ...]] = ()

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the condition of a picture, with the same size.  Raises ValueError if it cannot be computed."""
        ...

    def read(self, file: str | Path | Held, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the condition in a file.

        size: (height, width) of its picture; None takes the size from the file.
        Raises ValueError naming an unreadable file.
        """
        return self.make(reading.picture(file))
