"""Annotations: every public function says what it takes and gives.  `make lint` checks that it is true."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
# Modules and packages whose functions are not annotated yet.  To be emptied; nothing new belongs here.
NOT_YET = (
    "sdjax/methods",
    "sdjax/sampling/generate.py",
)


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


def files(places):
    """Returns the modules of the package that lie in one of the places, modules or folders."""
    inside = [ROOT / place for place in places]
    return [path for path in sorted((ROOT / "sdjax").rglob("*.py")) if {path, *path.parents} & set(inside)]


def test_a_bare_function_is_found():
    assert bare("def f(a, *, b: int) -> int: ...") == bare("def f(a: int): ...") == ["f"]
    assert bare("class A:\n def __call__(self, x) -> int: ...\n def _g(self, x): ...") == ["__call__"]
    assert bare("class A:\n def __init__(self, a: int): ...\ndef _f(a): ...\ndef g(*a: int) -> int: ...") == []


def test_public_functions_are_annotated():
    done = set(files(["sdjax"])) - set(files(NOT_YET))
    assert {str(path.relative_to(ROOT)): names for path in done if (names := bare(path.read_text()))} == {}


@pytest.mark.parametrize("place", NOT_YET)
def test_what_is_annotated_leaves_the_list(place):
    assert any(bare(path.read_text()) for path in files([place])), f"{place}: take it out, here and in pyproject.toml"


def test_the_checker_passes_over_no_more_than_these():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["basedpyright"]
    assert sorted(settings["exclude"]) == sorted(NOT_YET) and settings["include"] == ["sdjax"]
    assert settings["typeCheckingMode"] == "standard"
