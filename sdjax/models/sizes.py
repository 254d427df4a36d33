"""Ranges of the numbers in a model's config.json, checked before a network is built.

check(config, "unet", most={"layers_per_block": 64})      # ValueError in one line for a value of another type or range
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from sdjax.settings import shown

WIDTH = 1 << 16  # largest whole number without a range of its own; Stable Diffusion has 4,096
LEVELS = 16  # most levels of a network; Stable Diffusion has 4


def check(config: Any, owner: str = "", zero: tuple[str, ...] = (), most: Mapping[str, int] | None = None) -> None:
    """Raises ValueError if a field of a config has a value of the wrong type or out of range.

    Whole numbers are at least 1, or 0 for the names in `zero`, and at most most[name], or WIDTH.  Tuples have 1 to
    LEVELS numbers.  Other numbers are finite.
    owner: precedes the field's name in the message.
    """
    for field in dataclasses.fields(config):
        value, low, high = getattr(config, field.name), int(field.name not in zero), (most or {}).get(field.name, WIDTH)
        if not _fits(value, field.type, low, high):
            said = " or ".join(_words(kind, low, high) for kind in _options(field.type))
            raise ValueError(f"{owner and f'{owner} '}{field.name}={shown(value)}: expected {said}")


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any, low: int, high: int) -> bool:
    """Returns whether a value has a type, and its numbers are in range."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one, low, high) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner, several = typing.get_args(kind)[0], type(value) is tuple and 0 < len(value) <= LEVELS
        return several and all(_fits(one, inner, low, high) for one in value)
    if kind is int:
        return type(value) is int and low <= value <= high
    if kind is float:
        return type(value) in (int, float) and abs(value) <= 1e300  # false for NaN
    return value is None if kind is type(None) else type(value) is kind


def _words(kind: Any, low: int, high: int) -> str:
    if typing.get_origin(kind) is tuple:
        inner = _words(typing.get_args(kind)[0], low, high)
        return f"1 to {LEVELS} values, each {inner}"
    if kind is int:
        return f"a whole number from {low} to {high}"
    return {float: "a number", bool: "true or false", str: "a text", type(None): "null"}.get(kind, str(kind))
