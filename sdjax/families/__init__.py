"""The families of models, one file each: what parts a model has, how its words are read, how its folder looks.

family.py says what a family is; a new file here is a new family, found by walking the package (`known`).
"""

import sys

from sdjax.families.family import Family
from sdjax.runtime.members import members


def known() -> dict[str, Family]:
    """Returns {class name: family} of all families."""
    return {name: family() for name, family in members(sys.modules[__name__], Family).items()}


def of_pipeline(name: object) -> Family:
    """Returns the family of a class in model_index.json; raises ValueError that tells the known ones."""
    there = {pipeline: family for family in known().values() for pipeline in family.pipelines}
    if name not in there:
        raise ValueError(f"_class_name={name!r}: expected one of {', '.join(there)}")
    return there[name]
