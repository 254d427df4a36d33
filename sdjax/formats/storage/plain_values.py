"""What a reader of pickles gives back: trees of plain values, small enough to be walked through."""

from typing import Any

import numpy as np

from sdjax.formats.storage.archives import check

STEPS = 500_000  # of the machine; also values that can be reached from the result
DEPTH = 100  # of values within values
LEAVES = (str, bytes, int, float, bool, type(None), np.ndarray)


def plain(value: Any) -> Any:
    """Returns the value where it is a tree of plain values, of at most STEPS nodes and DEPTH levels; never a cycle.

    A value within itself, or lists that hold the same list twice over many levels, would keep a walk through it busy
    for ever.
    """
    known = {}

    def measure(value: Any, depth: int) -> tuple[int, int]:
        """Returns (number of values, levels) of a value."""
        if type(value) in LEAVES:
            return 1, 1
        check(type(value) in (dict, list, tuple, set), f"the pickle holds a {type(value).__name__}")
        if id(value) not in known:
            check(depth < DEPTH, f"values within values over more than {DEPTH} levels")
            inner = [measure(item, depth + 1) for item in (value.values() if type(value) is dict else value)]
            known[id(value)] = (1 + sum(n for n, _ in inner), 1 + max((levels for _, levels in inner), default=0))
        number, levels = known[id(value)]
        check(depth + levels <= DEPTH + 1, f"values within values over more than {DEPTH} levels")
        check(number <= STEPS, f"more than {STEPS} values")
        return number, levels

    measure(value, 0)
    return value
