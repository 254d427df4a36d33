"""The settings of a recipe for a form: names, values and meanings.

    for one in declared("lora"): print(one.name, one.value, one.help)       # "optim.lr" 0.0001 "..."

The meaning comes from the docstring of the dataclass: sentences that begin with "name:" or "name, other:".
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdjax import settings
from sdjax.service import teaching
from sdjax.settings import SettingError
from sdjax.training.recipes import known

ABOUT = re.compile(r"(?:^|(?<=[.;\]]))\s+((?:[a-z]\w*)(?:, [a-z]\w*)*): ", re.MULTILINE)


@dataclass(frozen=True)
class Declared:
    """A setting of a recipe: dotted name, value, and help ("" if undocumented)."""

    name: str
    value: Any
    help: str

    @property
    def group(self) -> str:
        """The first part of the name; "" for a setting of the run itself."""
        return self.name.partition(".")[0] if "." in self.name else ""


def declared(recipe: str) -> list[Declared]:
    """Returns the settings of a recipe that a request may set.  Raises SettingError for an unknown recipe."""
    there = known()
    if recipe not in there:
        raise SettingError("recipe", recipe, f"one of {', '.join(there)}")
    return [one for one in _walk(settings.load(there[recipe]), "") if teaching.may(one.name) and _is_plain(one.value)]


def about(recipe: str) -> str:
    """Returns the first sentence of a recipe's docstring."""
    text = settings.describe(known()[recipe]).split("\n\n")[0]
    return " ".join(text.split())


def meanings(made: Any) -> dict[str, str]:
    """Returns {field: its text in the docstring of its dataclass}."""
    text = "\n" + (inspect.getdoc(type(made)) or "")
    parts = ABOUT.split(text)
    found = {}
    for names, said in zip(parts[1::2], parts[2::2], strict=True):
        for name in names.split(", "):
            found[name] = " ".join(said.split())
    return found


def _walk(made: Any, prefix: str) -> Iterator[Declared]:
    said = meanings(made)
    for field in dataclasses.fields(made):
        value, name = getattr(made, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{name}.")
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            for i, item in enumerate(value):
                yield from _walk(item, f"{name}.{i}.")
        else:
            yield Declared(name, value, said.get(field.name, ""))


def _is_plain(value: Any) -> bool:
    flat = value if isinstance(value, tuple) else (value,)
    return all(item is None or isinstance(item, (bool, int, float, str)) for item in flat)
