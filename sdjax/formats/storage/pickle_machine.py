"""The state of a reader of pickles: stack, memo, and what the file may still make and go through."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from sdjax.formats.storage.archives import check

MADE = 2**25  # bytes that the values of a pickle may take, on top of REPEATS times the file's size
ENTRY = 100  # bytes of an entry in the memo, or of a stack that MARK puts aside
WALKED = 1_000_000  # values that steps go through; the largest files of weights hold 200,000
REPEATS = 4  # tensors may lie on the same numbers; their sizes together: at most this often the file's
Storage = Callable[[np.dtype, str, int], np.ndarray]  # (type, key, count) -> numbers


class Machine:
    """The state of a run: the stack, the stacks that MARK put aside, the memo.

    left: how many bytes tensors may still have; room: how many all other values may take; walked: how many values its
    steps went through.
    """

    def __init__(self, storage: Storage | None, left: int):
        self.stack, self.marks, self.memo = [], [], {}
        self.storage, self.left, self.room, self.walked = storage, left, left + MADE, 0

    def spend(self, size: int) -> None:
        """Takes bytes off those that the pickle's values may take."""
        self.room -= size
        check(self.room >= 0, f"its values take more than {REPEATS} times the file's size and {MADE} bytes")

    def walk(self, items: Iterable[Any]) -> None:
        """Counts items that one step goes through, which a pickle may make it do again and again, and long keys."""
        self.walked += sum(1 + len(one) // 256 if type(one) in (str, bytes) else 1 for one in items)
        check(self.walked <= WALKED, f"its steps go through more than {WALKED} values")

    def fill(self, value: Any, change: Callable[[], object]) -> None:
        """Changes a list, dict or set, and counts by how much it grew."""
        before = sys.getsizeof(value)
        change()
        self.spend(sys.getsizeof(value) - before)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        check(self.stack, "the pickle takes a value from an empty stack")
        return self.stack.pop()

    def take(self) -> list[Any]:
        """Returns the list of values since the last MARK; the stack is again the one before it."""
        check(self.marks, "the pickle has no MARK where it needs one")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def top(self, kind: type | None = None) -> Any:
        """Returns the last value, which stays; of one kind where a kind is given."""
        check(self.stack, "the pickle looks at an empty stack")
        value = self.stack[-1]
        check(kind in (None, type(value)), f"the pickle fills a {type(value).__name__} as if it were something else")
        return value
