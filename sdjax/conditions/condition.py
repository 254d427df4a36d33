"""What a condition is: a picture for a ControlNet, made of a picture or read from a file.

    canny = conditions.of("canny:low=50")
    edges = canny.make(picture)                        # uint8 [H W 3]
    skeleton = conditions.of("openpose").read("pose.json")

The same makers serve training (data.condition), sampling (--preprocess) and whoever has a picture.
"""

from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import UInt8

from sdjax.images import reading


class Condition(Protocol):
    """A frozen dataclass of settings that names this class as its base; a file of this package for each.

    name: in data.condition and --preprocess.  kind: what it shows, in a few words.
    endings: of the file beside a training picture that it is read from, the first that is there; () where the condition
    is made of the picture itself.
    private: settings that name files or models, which nobody but the user who starts a program may give.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # of the dataclass that it is
    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    endings: ClassVar[tuple[str, ...]] = ()
    private: ClassVar[tuple[str, ...]] = ()

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the condition of a picture, of its size.  Raises ValueError where a picture holds no such thing."""
        ...

    def read(self, file: str | Path, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the condition that a file stands for.

        size: (height, width) of the picture that it belongs to; None where only the file tells.
        Raises ValueError naming the file where it cannot be read.
        """
        return self.make(reading.picture(file))
