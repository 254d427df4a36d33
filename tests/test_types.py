"""Annotations: every public function says what it takes and gives.  `make lint` checks that it is true."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def public(tree):
    """Yields the public functions of a module, and the methods of its public classes, special ones too."""
    for node in tree.body:
        if isinstance(node, FUNCTION) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = (one for one in node.body if isinstance(one, FUNCTION))
            yield from (one for one in methods if not one.name.startswith("_") or one.name.endswith("__"))


def bare(text):
    """Returns the names of the public functions in a module's text that lack an annotation."""
    found = []
    for function in public(ast.parse(text)):
        given = function.args
        taken = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        silent = [one.arg for one in taken if one.annotation is None and one.arg not in ("self", "cls")]
        tells = function.returns is not None or function.name in ("__init__", "__post_init__")
        found += [function.name] if silent or not tells else []
    return found


def test_a_bare_function_is_found():
    assert bare("def f(a, *, b: int) -> int: ...") == bare("def f(a: int): ...") == ["f"]
    assert bare("class A:\n def __call__(self, x) -> int: ...\n def _g(self, x): ...") == ["__call__"]
    assert bare("class A:\n def __init__(self, a: int): ...\ndef _f(a): ...\ndef g(*a: int) -> int: ...") == []


def test_public_functions_are_annotated():
    modules = sorted((ROOT / "sdjax").rglob("*.py"))
    assert modules and {str(path): names for path in modules if (names := bare(path.read_text()))} == {}


def test_the_checker_passes_over_nothing():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["basedpyright"]
    assert settings["typeCheckingMode"] == "standard"
    assert settings["include"] == ["sdjax"] and not settings.keys() & {"exclude", "ignore"}
