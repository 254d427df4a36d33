"""The members of a kind, found by walking a package: a new one is a new file, and no table names it.

    members(sdjax.methods, Method)          # {"Chain": Chain, "Clip": Clip, ...}

A member is a class that names the contract's Protocol among its bases; every module of the package is imported.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def members(package: ModuleType, contract: type) -> dict[str, type]:
    """Returns {name: class} of all classes that the modules of a package define for a contract, sorted by module."""
    modules = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    found = [importlib.import_module(f"{package.__name__}.{name}") for name in modules]
    own = ((module.__name__, value) for module in found for value in vars(module).values())
    return of((value for name, value in own if getattr(value, "__module__", "") == name), contract)


def values(package: ModuleType, kind: type[T]) -> list[T]:
    """Returns all values of a class that the modules of a package name, sorted by module, as they stand in it."""
    modules = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    found = [importlib.import_module(f"{package.__name__}.{name}") for name in modules]
    return list(dict.fromkeys(value for module in found for value in vars(module).values() if isinstance(value, kind)))


def of(values: Iterable[object], contract: type) -> dict[str, type]:
    """Returns {name: class} of the classes among `values` that name the contract as a base."""
    return {
        value.__name__: value
        for value in values
        if isinstance(value, type) and contract in value.__mro__ and value is not contract
    }
