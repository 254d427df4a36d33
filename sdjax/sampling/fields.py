"""Declares settings of pictures; tables and checks derive from the declarations.

    @declared
    class Amount:
        amount: Annotated[float, Interval(ge=0, le=1), Setting("how much of it", "Amount")] = 0.5

    fields(Amount)["amount"].accepted      # "0 to 1"
    Amount(amount=2)                       # raises SettingError: amount=2: expected 0 to 1

annotated_types' Interval, Choice and Setting add what the type does not express.  A part is a frozen dataclass of
related settings.  A task lists parts as bases and overrides a default by `name = value`.
"""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Interval

from sdjax.settings import UNSAID, SettingError, nearest

LARGEST = float(np.finfo(np.float32).max)  # sampling is in float32; error messages call this bound finite
SMALLEST = float(np.finfo(np.float32).tiny)
Share = Annotated[float, Interval(ge=0, le=1)]
Some = Annotated[float, Interval(gt=0, le=1)]
Finite = Annotated[float, Interval(ge=-LARGEST, le=LARGEST)]
From0 = Annotated[float, Interval(ge=0, le=LARGEST)]
LONGEST_SIDE = 100_000_000  # pixels
NOTHING = dataclasses.MISSING


class Setting(NamedTuple):
    """Attributes of a setting that its type does not express.

    help: its help text.  word: its name in A1111's text, or ours in that style.  api: its name in A1111's API; a size
    has two.
    unsaid: the value of a text without the word, if it is not the default.  always: write the word for that value too.
    own: it may differ between pictures of a batch.  needs: a setting that must be set for an effect.
    file: it names files.  mine: only the user who starts a program may set it, not a list, record or browser.
    private: left out of public records.  step: step width of a slider.
    """

    help: str
    word: str = ""
    api: str = ""
    unsaid: object = NOTHING
    always: bool = False
    own: bool = False
    needs: str = ""
    file: bool = False
    mine: bool = False
    private: bool = False
    step: float = 0.05

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Any:
        return handler(core) | {"description": self.help}


class Choice(dict):
    """Accepted names, {ours: A1111's}; both are accepted, and the names of `also`, {theirs: ours}."""

    others: Mapping[str, str] = types.MappingProxyType({})
    last = ""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash((*self.items(), *self.others.items()))

    def also(self, **others: str) -> "Choice":
        """Returns the Choice with further accepted names."""
        made = Choice(self)
        made.others = others
        return made

    def rest(self, name: str) -> "Choice":
        """Returns the Choice with a replacement for A1111's names that we lack, see `near`."""
        made = Choice(self).also(**self.others)
        made.last = name
        return made

    def near(self, name: str) -> str:
        """Returns our name whose label is the start of A1111's name, or else the name of `rest`, or ""."""
        return next((own for own, label in self.items() if name.startswith(label)), self.last) if self.last else ""

    def ours(self, name: object) -> object:
        """Returns our name for A1111's, ignoring case; another value unchanged."""
        same, theirs = str(name).casefold(), {label: own for own, label in self.items()} | dict(self.others)
        return name if name in self else next((own for label, own in theirs.items() if same == label.casefold()), name)

    def __get_pydantic_core_schema__(self, _: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(
            self.ours, handler.generate_schema(typing.Literal[tuple(self)])
        )


class Size(NamedTuple):
    """Pixels (height, width), written as "WIDTHxHEIGHT"; also parses 512, "512" and such a pair."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    __repr__ = __str__

    @classmethod
    def of(cls, value: Any) -> "Size":
        """Returns the Size of a value.  Raises ValueError for anything that it cannot parse."""
        if isinstance(value, str):
            sides = [int(side) for side in value.lower().split("x")][::-1]
        else:
            sides = [int(side) for side in (value if isinstance(value, (list, tuple)) else [value])]
        if len(sides) not in (1, 2) or min(sides) < 1 or max(sides) > LONGEST_SIDE:
            raise ValueError(value)
        return cls(sides[0], sides[-1])

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(
            cls.of,
            core_schema.is_instance_schema(cls),
            serialization=core_schema.to_string_ser_schema(),
            json_schema_input_schema=core_schema.str_schema(pattern=r"^[1-9]\d*x[1-9]\d*$"),
        )


NOUNS = {int: "a whole number", bool: "true or false", Size: "pixels, or WIDTHxHEIGHT such as 512x768"}


@dataclasses.dataclass(frozen=True)
class Field:
    """A declared setting: name, type, its part, its default (NOTHING: required)."""

    name: str
    hint: Any
    kind: type
    several: bool
    optional: bool
    part: type
    usual: Any
    span: Interval | None
    choices: Choice | None
    about: Setting

    @property
    def unsaid(self) -> Any:
        """The setting's value for an A1111 text without its word."""
        return self.usual if self.about.unsaid is NOTHING else self.about.unsaid

    @property
    def unbounded(self) -> bool:
        """Whether every finite number is accepted."""
        ends = (getattr(self.span, end, None) for end in ("ge", "gt", "le", "lt"))
        return self.kind is float and all(end is None or abs(end) >= LARGEST for end in ends)

    @property
    def accepted(self) -> str:
        """The accepted values, for errors and help."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        low, high, above = (getattr(self.span, end, None) for end in ("ge", "le", "gt"))
        if above is not None:
            span = f"more than {above:g}, to {high:g}" if high is not None and high < LARGEST else f"above {above:g}"
        elif low is not None and high is not None and -LARGEST < low and high < LARGEST:
            span = f"{low:g} to {high:g}" if high < 1e6 else "of at most 64 bits"
        elif low is not None and low > -LARGEST:
            span = "above 0" if low == SMALLEST else f"{low:g} or more"
        else:
            span = f"a finite number, at most {LARGEST:.3g}"
        if self.kind is int:
            return f"{NOUNS[int]}, {span}"
        return span if self.kind is float else NOUNS.get(self.kind, "a text")


def declared(part: type) -> type:
    """Returns a class of settings, a part or a task, as a frozen dataclass that validates itself.

    A line such as `steps = 75` overrides the default of an inherited setting.
    A part may have `fill(self)`, which returns {name: value} of settings that follow from others, and `rule(self)`,
    which raises SettingError for settings that do not fit each other.
    """
    bases = reversed(part.__mro__[1:])
    inherited = {name: hint for base in bases for name, hint in inspect.get_annotations(base).items()}
    again = {name: hint for name, hint in inherited.items() if name in vars(part)}
    part.__annotations__ = again | inspect.get_annotations(part)
    part.__post_init__ = _check
    return dataclasses.dataclass(frozen=True, kw_only=True)(part)


@functools.cache
def fields(task: type) -> dict[str, Field]:
    """Returns {name: Field} of a part's or a task's settings, in the order of its parts."""
    usual = {field.name: field.default for field in dataclasses.fields(task)}
    hints = typing.get_type_hints(task, include_extras=True)
    made = {}
    for part in (cls for cls in task.__mro__ if dataclasses.is_dataclass(cls)):
        for name in inspect.get_annotations(part):
            if name in usual and not any(name in inspect.get_annotations(base) for base in part.__mro__[1:]):
                made[name] = _field(name, hints[name], part, usual[name])
    return made


def _field(name: str, hint: Any, part: type, usual: Any) -> Field:
    kind, *said = typing.get_args(hint)
    optional = isinstance(kind, types.UnionType)
    kind = typing.get_args(kind)[0] if optional else kind
    several = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if several else kind
    if typing.get_origin(kind) is typing.Annotated:
        kind, *more = typing.get_args(kind)
        said += more
    found = {type(one): one for one in said}
    return Field(
        name, hint, kind, several, optional, part, usual, found.get(Interval), found.get(Choice), found[Setting]
    )  # fmt: skip


@functools.cache
def _adapter(hint: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(hint)


def checked(field: Field, value: Any, text: bool = False) -> Any:
    """Returns a value in the setting's type.  text: parse numbers from text, as in flags and lists.

    Raises SettingError for a value that is not accepted.
    """
    import pydantic

    given = value.item() if getattr(value, "ndim", 1) == 0 else value  # a numpy scalar
    if given is None and field.optional:
        return None
    items = given if field.several and isinstance(given, (list, tuple)) else (given,)
    number = field.kind in (int, float)
    try:
        for item in items:
            if isinstance(item, bool) != (field.kind is bool) and not text or isinstance(item, str) and number > text:
                raise ValueError(item)
            if isinstance(item, bool) and number or isinstance(item, float) and math.isnan(item):
                raise ValueError(item)
        made = _adapter(field.hint).validate_python(tuple(items) if field.several else given)
        if number and any(math.isnan(item) for item in (made if field.several else [made])):
            raise ValueError(made)
    except (pydantic.ValidationError, ValueError, OverflowError):
        raise SettingError(field.name, value, field.accepted) from None
    return made


def _check(self: Any) -> None:
    task = type(self)
    for name, field in fields(task).items():
        value = getattr(self, name)
        object.__setattr__(self, name, value if value is field.usual else checked(field, value))
    for part in reversed(task.__mro__):
        for name, value in vars(part)["fill"](self).items() if "fill" in vars(part) else ():
            object.__setattr__(self, name, value)
    for part in reversed(task.__mro__):
        if "rule" in vars(part):
            vars(part)["rule"](self)


def make(task: type, values: Mapping[str, object], text: bool = False) -> Any:
    """Returns a task's settings from {name: value}; a missing value, or None, means the default.

    text: parse numbers from text.
    Raises SettingError for an unknown name, a value that is not accepted, a setting whose `needs` is not set, and
    settings that do not fit each other.
    """
    known = fields(task)
    values = understood(task, {name: value for name, value in values.items() if value is not None})
    values = {name: checked(known[name], value, text) for name, value in values.items()}
    for name, value in values.items():
        needed = known[name].about.needs
        absent = needed in known and known[needed].usual in (None, ()) and not values.get(needed)
        if absent and value != known[name].usual:
            raise SettingError(name, value, f"together with {needed}")
    for name in task.asked:
        if name not in values:
            raise SettingError(name, UNSAID, known[name].accepted, "missing")
    return task(**values)


def understood(task: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: value} with other spellings replaced by ours, as each part's `spelled` does.

    Raises SettingError for an unknown name.
    """
    found = dict(values)
    for part in task.__mro__:
        found = vars(part)["spelled"].__func__(found) if "spelled" in vars(part) else found
    for name in found:
        if name not in fields(task):
            raise SettingError(name, UNSAID, nearest(name, fields(task)), "unknown")
    return found


def acting(made: Any) -> dict[str, Any]:
    """Returns {name: value} of the settings that have an effect: settings whose `needs` is also set."""
    known, values = fields(type(made)), {}
    for name, field in known.items():
        needed = field.about.needs
        if needed not in known or getattr(made, needed):
            values[name] = getattr(made, name)
    return values
