"""Flags of the command line, made from the declarations of settings; argparse only splits."""

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

from sdjax.sampling.fields import Field, fields


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose flags are written out."""

    def __init__(self, doc: str | None, **more: Any) -> None:
        how = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=how, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def flag(name: str) -> str:
    """Returns a setting's name as a flag."""
    return f"--{name.replace('_', '-')}"


def add(parser: argparse.ArgumentParser, tasks: Iterable[type], usual: dict[str, Any], lists: bool = False) -> None:
    """Adds a flag for each setting of tasks; one that is not given leaves no trace.

    usual: what the program takes in place of the declared values.  lists: a flag's text is that of a field of a list,
    where several prompts or numbers are a matrix.
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
    said = [one.about.help, one.accepted if one.kind is not str or one.choices is not None else ""]
    if value not in (None, "", (), False):
        said.append(f"default: {' '.join(map(str, value)) if isinstance(value, tuple) and one.several else value}")
    return "; ".join(filter(None, said)).replace("%", "%%")
