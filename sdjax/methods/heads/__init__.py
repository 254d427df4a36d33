"""E4T's heads, one file each: they compute the offset of a word from features of a picture and of the UNet.

    head = heads.of(trees.names(trained["head"]))     # Tokens(), found by the names of the weights
    head = heads.of(trees.names(trained["head"]), features="level")

head.py defines the interface.  A new file here is a new head, found by walking the package.
"""

import sys
from collections.abc import Iterable

from sdjax.methods.heads.head import Head
from sdjax.runtime.members import members


def known() -> dict[str, type[Head]]:
    """Returns {name: class} of all heads."""
    return members(sys.modules[__name__], Head)


def of(names: Iterable[str], features: str = "all") -> Head:
    """Returns the head whose weights have these dotted names; features: see Head.

    Raises ValueError if no head has such weights, and for features that the head cannot take.
    """
    names = tuple(names)
    for made in known().values():
        if made.matches(names):
            return made(features)  # pyright: ignore[reportCallIssue]  # a dataclass
    raise ValueError(f"no head of E4T that is known: {len(names)} weights, among them {', '.join(names[:3])}")
