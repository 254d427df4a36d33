"""The families of models, one file each: their parts, their text encoders, their folder layout.

family.py defines the interface; `known` finds every family in this package.
"""

import sys

from sdjax.families.family import Family
from sdjax.runtime.members import members


def known() -> dict[str, Family]:
    """Returns {class name: family} of all families."""
    return {name: family() for name, family in members(sys.modules[__name__], Family).items()}


def of_pipeline(name: object) -> Family:
    """Returns the family of a class in model_index.json.  Raises ValueError with the known ones for other classes."""
    there = {pipeline: family for family in known().values() for pipeline in family.pipelines}
    if name not in there:
        raise ValueError(f"_class_name={name!r}: expected one of {', '.join(there)}")
    return there[name]
