"""Kinds of weight changes, one file each: LoRA, DoRA, LoHa, LoKr, OFT, and the whole differences in files.

    kind = deltas.of({"down": a, "up": b, "scale": 0.5})        # Lora(), found by the names of the factors
    change = kind.change(factors, weight)                       # D(W), for files and for sampling
    more = kind.run(factors, x, y, layer, drop)                 # the change of the layer's output, for training

Factors have the axes of PyTorch's files: W [out in] or [out in height width]; r is the rank.  delta.py defines the
interface.  A new file here is a new kind, found by walking the package.
"""

import functools
import sys
from collections.abc import Iterable

from sdjax.methods.deltas.delta import Delta
from sdjax.runtime.members import members


@functools.cache
def known() -> tuple[Delta, ...]:
    """Returns one Delta of each kind."""
    return tuple(made() for made in members(sys.modules[__name__], Delta).values())


def of(names: Iterable[str]) -> Delta:
    """Returns the kind with factors of these names.  Raises ValueError for unknown names."""
    names = frozenset(names)
    found = [kind for kind in known() if kind.matches(names)]
    if len(found) != 1:
        raise ValueError(f"{', '.join(sorted(names))}: these make no change of a weight that is known")
    return found[0]


def named(algo: str) -> Delta:
    """Returns the kind for a value of the setting `algo`, see `algorithms`."""
    return next(kind for kind in known() if kind.name == algo)


def algorithms() -> tuple[str, ...]:
    """Returns the names of the kinds that can be trained."""
    return tuple(sorted(kind.name for kind in known() if kind.name))
