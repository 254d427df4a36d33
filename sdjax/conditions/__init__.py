"""Conditions: the pictures that ControlNets read, such as edges, lines, skeletons and depth maps.

condition.py defines the interface; `known` finds every condition in this package.
"""

import dataclasses
import sys

from sdjax.conditions.condition import Condition
from sdjax.runtime.members import members
from sdjax.settings import SettingError


def known() -> dict[str, type[Condition]]:
    """Returns {name: class} of all conditions."""
    return {kind.name: kind for kind in members(sys.modules[__name__], Condition).values()}


def of(text: str, public: bool = False) -> Condition:
    """Returns the condition for a text with settings: "canny", "canny:low=50,high=150".

    public: reject settings that name files or models, for texts from lists and browsers.
    Raises SettingError for an unknown name, setting or value.
    """
    name, _, rest = text.partition(":")
    kinds = known()
    if name not in kinds:
        raise SettingError("condition", text, f"one of {', '.join(kinds)}")
    kind, values = kinds[name], {}
    kept = kind.private if public else ()
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in kept}
    for item in rest.split(",") if rest else ():
        key, found, value = item.partition("=")
        if key not in fields or not found:
            accepted = ", ".join(f"{one}=VALUE" for one in fields)
            raise SettingError("condition", text, f"{name}:{accepted}" if accepted else name)
        values[key] = _value(text, fields[key], value)
    return kind(**values)


def _value(text, field, value):
    kind = type(field.default)
    try:
        return kind(value)
    except ValueError:
        raise SettingError("condition", text, f"a {kind.__name__} for {field.name}") from None
