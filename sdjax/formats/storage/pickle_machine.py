"""The state of the pickle reader: stack, memo, and the budgets for memory and work that a file has left."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from sdjax.formats.storage.archives import check

MADE = 2**25  # most bytes of a pickle's values, on top of REPEATS times the file's size
ENTRY = 100  # bytes of an entry in the memo, or of a stack that MARK saves
WALKED = 1_000_000  # most values that steps visit; the largest weight files have 200,000
REPEATS = 4  # tensors may share numbers; their total size is at most this multiple of the file's
Storage = Callable[[np.dtype, str, int], np.ndarray]  # (type, key, count) -> numbers


class Machine:
    """The state of a run: the stack, the stacks that MARK saved, the memo.

    left: bytes that tensors may still have.  room: bytes that all values may still take.  walked: values that steps
    have visited.
    """

    def __init__(self, storage: Storage | None, left: int):
        self.stack, self.marks, self.memo = [], [], {}
        self.storage, self.left, self.room, self.walked = storage, left, left + MADE, 0

    def spend(self, size: int) -> None:
        """Subtracts bytes from the room for values; raises ValueError if none is left."""
        self.room -= size
        check(self.room >= 0, f"its values take more than {REPEATS} times the file's size and {MADE} bytes")

    def walk(self, items: Iterable[Any]) -> None:
        """Counts the items that a step visits, long keys more than once; raises ValueError above WALKED.

        A pickle may make a step visit the same items many times.
        """
        self.walked += sum(1 + len(one) // 256 if type(one) in (str, bytes) else 1 for one in items)
        check(self.walked <= WALKED, f"its steps go through more than {WALKED} values")

    def fill(self, value: Any, change: Callable[[], object]) -> None:
        """Changes a list, dict or set, and subtracts its growth from the room."""
        before = sys.getsizeof(value)
        change()
        self.spend(sys.getsizeof(value) - before)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        check(self.stack, "the pickle takes a value from an empty stack")
        return self.stack.pop()

    def take(self) -> list[Any]:
        """Returns the values since the last MARK and restores the stack before it."""
        check(self.marks, "the pickle has no MARK where it needs one")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def top(self, kind: type | None = None) -> Any:
        """Returns the last value without removing it.  kind: its required type, or None."""
        check(self.stack, "the pickle looks at an empty stack")
        value = self.stack[-1]
        check(kind in (None, type(value)), f"the pickle fills a {type(value).__name__} as if it were something else")
        return value
