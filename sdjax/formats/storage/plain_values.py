"""Checks the result of the pickle reader: a tree of plain values of limited size."""

from typing import Any

import numpy as np

from sdjax.formats.storage.archives import check

STEPS = 500_000  # most steps of the machine, and most values in the result
DEPTH = 100  # most levels of nested values
LEAVES = (str, bytes, int, float, bool, type(None), np.ndarray)


def plain(value: Any) -> Any:
    """Returns the value; raises ValueError unless it is a tree of plain values with few nodes and levels.

    There are at most STEPS nodes and DEPTH levels: a value that contains itself, or nested lists that each contain the
    same list twice, would make a walk endless.
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
