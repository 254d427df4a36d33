"""Settings as nested frozen dataclasses: recipes in Python, overrides as a.b=value, and JSON that names no code.

    settings = load("configs/e4t_tune.py", ["steps=15", "method.parts.0.scale=0.1", "optim.clip=None"])
    text = json.dumps(to_json(settings))                    # {"class": "Train", "model": "pocket", ...}
    settings = from_json(json.loads(text), {"Train": Train, ...})

A dataclass with a function looked_up() -> (field, dataclass) takes unknown names from that dataclass, which then
becomes the field: data.count means data.source.count.

A recipe is a Python file with a function `config()`, run as the user's program.  JSON is data: the caller lists the
classes that it may name.  The fields' annotations give the types.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import math
import re
import runpy
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

CLASS = "class"  # key of a dataclass's name in JSON; fields cannot have this name
WORDS = {"true": True, "false": False, "none": None}
UNSAID = object()  # replaces a value that an error does not show
SHOWN = 60  # most letters of a shown value, from its start and end

# Ranges of numbers for `check`: a test and its text.
FROM_0 = (lambda x: 0 <= x < math.inf, "a number from 0")
SEED = (lambda x: 0 <= x < 2**63, "a number from 0 to below 2^63")
FROM_1 = (lambda x: 1 <= x < math.inf, "a number from 1")
ABOVE_0 = (lambda x: 0 < x < math.inf, "a number above 0")
FACTOR = (lambda x: abs(x) <= 1e6, "a number from -1e6 to 1e6")
TO_1 = (lambda x: 0 <= x <= 1, "a number from 0 to 1")
BELOW_1 = (lambda x: 0 <= x < 1, "a number from 0 to below 1")


class SettingError(ValueError):
    """A setting with a bad value: "steps=0: expected a whole number, 1 or more".

    why: the reason, if the value alone does not show it.  Callers with another spelling of settings, such as flags or
    list fields, use `line(spell)`; the text is not for parsing.
    """

    def __init__(self, name: str, value: object, expected: str, why: str = "") -> None:
        super().__init__(name, value, expected, why)
        self.name, self.value, self.expected, self.why = name, value, expected, why

    def line(self, spell: Callable[[str], str] = str) -> str:
        """Returns the error in one line; spell(name): returns the caller's spelling of a setting's name."""
        value = "" if self.value is UNSAID else f"={shown(self.value)}"
        return f"{spell(self.name)}{value}: {self.why and f'{self.why}; '}expected {self.expected}"

    def __str__(self) -> str:
        return self.line()

    def under(self, prefix: str) -> "SettingError":
        """Returns the same error with a prefix before the setting's name, such as "method" before "scale"."""
        return SettingError(f"{prefix}.{self.name}", self.value, self.expected, self.why)


def shown(value: object) -> str:
    """Returns a value for an error message: one line, shortened in the middle, with numpy's numbers as Python's."""
    number: Any = value
    text = repr(number.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"


@contextlib.contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Adds a prefix, the field of the dataclass that raises it, to every SettingError in the block; "" adds none."""
    try:
        yield
    except SettingError as error:
        raise (error.under(prefix) if prefix else error) from None


def load(path: str | Path, overrides: Iterable[str] = ()) -> Any:
    """Returns config() of the Python file at `path` with overrides such as "optim.lr=1e-4".

    Raises ValueError for a missing file, invalid Python, a missing config(), and an override that does not fit.
    """
    make = names(path).get("config")
    if not callable(make):
        raise ValueError(f"config {str(path)!r}: has no function config()")
    return override(make(), overrides)


def names(path: str | Path) -> dict[str, object]:
    """Runs the Python file at `path` and returns {name: value} of its definitions.

    Raises ValueError for a missing file or invalid Python.
    """
    if not Path(path).is_file():
        raise ValueError(f"config {str(path)!r}: no such file; expected a Python file with a function config()")
    try:
        return runpy.run_path(str(path))
    except SyntaxError as error:
        raise ValueError(f"config {str(path)!r}: {error.msg} ({error.filename}, line {error.lineno})") from None


def override(config: Any, items: Iterable[str]) -> Any:
    """Returns a copy of a nested dataclass with "a.b=value" items applied; a number in a name is a place in a tuple.

    All items of one dataclass apply together, so its own checks see only the result.  Of two items with one name, the
    later wins.
    Raises ValueError naming the item for an unknown name (with the nearest one) or a value of another type.
    """
    changes = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ValueError(f"{item!r}: expected name=value, as in steps=100 or optim.lr=1e-4")
        node, *rest = changes, *name.split(".")
        for head in rest[:-1]:
            node = node.setdefault(head, {})
            if isinstance(node, str):
                raise ValueError(f"{name}: a part of it is set as a whole by another override")
        if isinstance(node.get(rest[-1]), dict):
            raise ValueError(f"{name}: parts of it are set by other overrides")
        node[rest[-1]] = text
    return _changed(config, type(config), changes, "")


def check_pattern(name: str, text: str) -> None:
    """Raises SettingError with the setting's name for an invalid regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise SettingError(name, text, f"a regular expression: {error}") from None


def check(config: object, **accepted: tuple) -> None:
    """Raises SettingError for a field outside its accepted values: a tuple of choices, or a range such as FROM_0."""
    for name, wanted in accepted.items():
        value = getattr(config, name)
        if callable(wanted[0]):
            fits, words = wanted[0](value), wanted[1]
        else:
            fits, words = value in wanted, f"one of {', '.join(str(one) or repr(one) for one in wanted)}"
        if not fits:
            raise SettingError(name, value, words)


def describe(path: str | Path) -> str:
    """Returns the --help text of a recipe: its docstring, its settings with values, and their meaning."""
    text = runpy.run_path(str(path)).get("__doc__") or ""
    found = list(_walk(load(path), ""))
    settings = [f"  {name} = {value!r}" for name, value in found if not _is_dataclass(value)]
    meant = {type(value): f"{name}: {inspect.getdoc(value)}" for name, value in found if name and _is_dataclass(value)}
    run = [inspect.getdoc(value) or "" for name, value in found if not name]
    settings = "\n".join(["settings (change them with name=value):", *settings])
    return "\n\n".join([text.strip(), settings, *run, *meant.values()])


def _walk(value, name):
    """Yields (dotted name, value) of a nested dataclass and of everything in it."""
    if _is_dataclass(value):
        yield name, value
        where, inner = value.looked_up() if hasattr(value, "looked_up") else ("", None)
        for field in dataclasses.fields(value):
            if field.name != where:
                yield from _walk(getattr(value, field.name), _join(name, field.name))
        if inner is not None:
            yield from _walk(inner, name)
    elif isinstance(value, tuple) and value and all(map(_is_dataclass, value)):
        for i, item in enumerate(value):
            yield from _walk(item, _join(name, str(i)))
    else:
        yield name, value


def to_json(config: Any) -> Any:
    """Returns a nested dataclass as dicts, lists and plain values; a dataclass's name is under "class".

    Raises ValueError for a value that JSON cannot hold, naming its place.
    """
    return _plain(config, "")


def from_json(data: Any, classes: dict[str, type]) -> Any:
    """Returns the nested dataclass of `to_json`'s output; classes: {name: dataclass} of the allowed classes.

    Raises ValueError for a class outside the table, an unknown or missing field, a value of another type.
    """
    return _built(data, classes, "")


def _changed(old, kind, changes, name):
    """Returns `old`, a field of type `kind`, with a tree of changes {head: text or tree} applied."""
    if isinstance(changes, str):
        if _is_dataclass(old) and not (changes.lower() == "none" and type(None) in _options(kind)):
            raise ValueError(
                f"{name}={changes}: a {type(old).__name__} is set by its fields: {', '.join(_fields(old))}"
            )
        return _parse(changes, kind, name)
    if _is_dataclass(old):
        kinds = typing.get_type_hints(type(old))
        own = {head: part for head, part in changes.items() if head in _fields(old)}
        new = {head: _changed(getattr(old, head), kinds[head], part, _join(name, head)) for head, part in own.items()}
        with prefixed(name):
            made = dataclasses.replace(old, **new)
        others = {head: part for head, part in changes.items() if head not in own}
        return _with_looked_up(made, others, name) if others else made
    if isinstance(old, tuple):
        return _changed_items(old, kind, changes, name)
    raise ValueError(f"{_join(name, next(iter(changes)))}: {name} is {old!r} and has no fields")


def _with_looked_up(config, changes, name):
    """Returns the dataclass with changes of unknown names applied to the field of its looked_up()."""
    field, inner = config.looked_up() if hasattr(config, "looked_up") else ("", None)
    fields = _fields(config) + (_fields(inner) if inner is not None else [])
    for head in changes:
        if head not in fields:
            raise ValueError(f"{_join(name, head)}: {_unknown(head, type(config).__name__, fields)}")
    return dataclasses.replace(config, **{field: _changed(inner, type(inner), changes, name)})


def _changed_items(old, kind, changes, name):
    items = list(old)
    for head, part in changes.items():
        if not head.isdecimal() or int(head) >= len(items):
            raise ValueError(f"{_join(name, head)}: {name} has {len(items)} items, numbered from 0")
        i = int(head)
        items[i] = _changed(items[i], _item_kind(kind, i), part, _join(name, head))
    return tuple(items)


def _item_kind(kind, i):
    """Returns the type of item i of a field of type `kind`, or `object` if the annotation does not give it."""
    for option in _options(kind):
        inner = typing.get_args(option)
        if typing.get_origin(option) is tuple and inner:
            return inner[0] if inner[-1] is Ellipsis else inner[i]
    return object


def _parse(text, kind, name):
    """Returns the value of a command line's text for a field of type `kind`."""
    options = _options(kind)
    if text.lower() in WORDS and not (str in options and type(None) not in options and bool not in options):
        value = WORDS[text.lower()]
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text
        if str in options and not isinstance(value, str) and not _fits(value, [o for o in options if o is not str]):
            value = text
    fitted = _fit(value, kind)
    if fitted is _WRONG:
        raise ValueError(f"{name}={text}: expected {_shown(kind)}")
    return fitted


_WRONG = object()


def _fit(value, kind):
    """Returns `value` as the type `kind` (an int as float, a list as tuple), or _WRONG."""
    options = _options(kind)
    if typing.Any in options or object in options:
        return _tuples(value)
    for option in options:
        origin, inner = typing.get_origin(option) or option, typing.get_args(option)
        if origin is typing.Literal and value in inner:
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            if inner and inner[-1] is Ellipsis:
                inner = (inner[0],) * len(value)
            items = [_fit(v, k) for v, k in zip(value, inner or (object,) * len(value), strict=False)]
            if len(items) == len(value) == len(inner or value) and _WRONG not in items:
                return tuple(items)
        elif isinstance(origin, type) and type(value) is origin:
            return value
        elif isinstance(origin, type) and _is_dataclass(value) and origin in type(value).__mro__:
            return value
    if float in options and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    return _WRONG


def _fits(value, options):
    return any(_fit(value, option) is not _WRONG for option in options)


def _options(kind):
    """Returns the members of a union, or the type itself as the only one."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _shown(kind):
    """Returns a type in readable form: "float or None", "tuple[str, ...], as in ('a', 'b')"."""
    names = " or ".join(
        "None" if k is type(None) else k.__name__ if type(k) is type else str(k) for k in _options(kind)
    )
    return names + (", as in ('a', 'b')" if "tuple[str" in names else "")


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _is_dataclass(value):
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(config):
    return [field.name for field in dataclasses.fields(config) if field.init]


def _join(name, head):
    return f"{name}.{head}" if name else head


def _unknown(head, owner, accepted):
    near = difflib.get_close_matches(head, accepted, 1)
    return f"{owner} has no {head!r}; " + (f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(accepted)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the closest known name, otherwise all of them."""
    known = list(known)
    return next(iter(difflib.get_close_matches(name, known, 1)), f"one of {', '.join(known)}")


def _plain(value, name):
    if _is_dataclass(value):
        fields = {field: _plain(getattr(value, field), _join(name, field)) for field in _fields(value)}
        return {CLASS: type(value).__name__, **fields}
    if isinstance(value, (list, tuple)):
        return [_plain(item, _join(name, str(i))) for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and CLASS not in value:
        return {key: _plain(item, _join(name, key)) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise ValueError(f"{name}={value!r}: cannot be written; expected a number, text, tuple or dataclass")


def _built(data, classes, name):
    if isinstance(data, list):
        return tuple(_built(item, classes, _join(name, str(i))) for i, item in enumerate(data))
    if not isinstance(data, dict):
        return data
    if CLASS not in data:
        return {key: _built(item, classes, _join(name, key)) for key, item in data.items()}
    if data[CLASS] not in classes:
        raise ValueError(f"{_join(name, CLASS)}={data[CLASS]!r}: accepted are {', '.join(sorted(classes))}")
    made = classes[data[CLASS]]
    kinds, values = typing.get_type_hints(made), {}
    for key in sorted(data.keys() - {CLASS}):
        if key not in _fields(made):
            raise ValueError(f"{_join(name, key)}: {_unknown(key, made.__name__, _fields(made))}")
        value = _built(data[key], classes, _join(name, key))
        values[key] = _fit(value, kinds[key])
        if values[key] is _WRONG:
            raise ValueError(f"{_join(name, key)}={value!r}: expected {_shown(kinds[key])}")
    try:
        with prefixed(name):
            return made(**values)
    except TypeError as error:
        raise ValueError(f"{name or made.__name__}: {error}") from None
