"""The methods, one file each: frozen dataclasses of settings with pure functions; one loop trains them all.

method.py defines the interface; `known` finds every method in this package.
"""

import sys

from sdjax.methods.method import Method
from sdjax.runtime.members import members


def known() -> dict[str, type[Method]]:
    """Returns {name: class} of all methods."""
    return members(sys.modules[__name__], Method)
