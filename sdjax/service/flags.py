"""Command-line flags from the declared settings; argparse only splits the arguments."""

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

from sdjax.sampling.fields import Field, fields


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, no abbreviated flags, and a usage line without all the flags."""

    def __init__(self, doc: str | None, usage: str = "%(prog)s [options]", **more: Any) -> None:
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=how, allow_abbrev=False, usage=usage, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def flag(name: str) -> str:
    """Returns a setting's name as a flag; that of a variable, such as ACCEL, as it is."""
    return name if name.isupper() else f"--{name.replace('_', '-')}"


def add(parser: argparse.ArgumentParser, tasks: Iterable[type], usual: dict[str, Any], lists: bool = False) -> None:
    """Adds a flag for each setting of the tasks; the parsed result lacks flags that were not given.

    usual: the program's defaults, which override the declared ones.  lists: flags use the syntax of list fields, where
    several prompts or numbers make a grid.
    """
    known = {name: one for task in tasks for name, one in fields(task).items()}
    groups = {one.part: parser.add_argument_group(one.part.__name__.lower()) for one in known.values()}
    for name, one in known.items():
        how: dict[str, Any] = {"metavar": name.upper()}
        if one.kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif name == "prompt" and not lists:
            how |= {"nargs": "+"}
        elif one.several:
            how |= {"nargs": "+", "action": "extend"}
        value = usual.get(name, one.usual)
        groups[one.part].add_argument(flag(name), default=argparse.SUPPRESS, help=_help(one, value), **how)


def _help(one: Field, value: Any) -> str:
    free = one.kind is str and one.choices is None or one.unbounded
    said = [one.about.help, "" if free else one.accepted]
    if value not in (None, "", (), False):
        said.append(f"default: {' '.join(map(str, value)) if isinstance(value, tuple) and one.several else value}")
    return "; ".join(filter(None, said)).replace("%", "%%")
