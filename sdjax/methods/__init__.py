"""The methods, one file each: frozen dataclasses of settings with pure functions, which one loop trains.

method.py says what a method is; a new file here is a new method, found by walking the package (`known`).
"""

import sys

from sdjax.methods.method import Method
from sdjax.runtime.members import members


def known() -> dict[str, type[Method]]:
    """Returns {name: class} of all methods."""
    return members(sys.modules[__name__], Method)
