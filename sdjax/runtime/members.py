"""Finds the members of a kind by walking a package, so a new member is a new file and needs no table.

    members(sdjax.methods, Method)          # {"Chain": Chain, "Clip": Clip, ...}

A member is a class with the interface's Protocol among its bases.  Every module of the package is imported.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def members(package: ModuleType, contract: type) -> dict[str, type]:
    """Returns {name: class} of a package's classes with an interface as base, sorted by module."""
    own = ((module.__name__, value) for module in _modules(package) for value in vars(module).values())
    return of((value for name, value in own if getattr(value, "__module__", "") == name), contract)


def values(package: ModuleType, kind: type[T]) -> list[T]:
    """Returns all module-level values of a class in a package, sorted by module and position."""
    every = (value for module in _modules(package) for value in vars(module).values())
    return list(dict.fromkeys(value for value in every if isinstance(value, kind)))


def _modules(package):
    """Returns a package's modules, imported, sorted by name."""
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def of(values: Iterable[object], contract: type) -> dict[str, type]:
    """Returns {name: class} of the classes in `values` with the interface as a base."""
    return {
        value.__name__: value
        for value in values
        if isinstance(value, type) and contract in value.__mro__ and value is not contract
    }
