"""The shape of the house: imports run one way, importing has no effects and costs little, files stay small."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sdjax

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "sdjax").rglob("*.py"))
PROGRAMS = [
    path for folder in ("train", "sample", "configs", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
# A module may import from its own floor and from those below it, and nothing in a circle.
FLOORS = (
    ("trees", "settings", "runtime", "images", "text", "models"),
    ("diffusion",),
    ("stable_diffusion",),
    ("families", "tasks", "methods", "conditions", "sampling"),
    ("formats",),
    ("data",),
    ("training",),
    ("service",),
    ("web",),
    ("convert", "client", "__main__"),
)
LOOSE = 8  # modules that may lie in sdjax/ itself
STRANGERS = ("sdjax.formats.models", "sdjax.formats.adapters")  # neither imports the other
FLOOR = {unit: i for i, floor in enumerate(FLOORS) for unit in floor}
EXTRAS = {"torch", "diffusers", "gradio", "peft"}
PAGE = "sdjax.web.page"  # the one package that may import gradio, where the extra `ui` is installed
LOGGING = {"wandb", "tensorboardX"}  # of the extra `logging`: asked for when a run begins, never by an import
MAKES_LAYERS = ("models", "methods/hypernetwork.py")


def imported(path):
    """Returns the dotted names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def renamed(path, own):
    """Returns the modules and names of ours that a file imports under another name.

    A program's `main` may have another: it does not name the program.
    """
    found = [
        (f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name, alias.asname)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    return [
        f"{name} as {other}"
        for name, other in found
        if other and name.split(".")[0] in own and not name.endswith(".main")
    ]


def unit(name):
    """Returns the part of the house that a dotted name or a file's parts lie in: "models" of sdjax.models.unet."""
    return name.split(".")[1] if name.count(".") else ""


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def python(program):
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 0, run.stderr
    return run


def dotted(path):
    """Returns the dotted name of a module's file, that of the package for its __init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def edges(paths):
    """Returns {module: the modules of the package that it imports}; a package counts as its __init__.py."""
    known = {dotted(path) for path in paths}
    return {dotted(path): (imported(path) & known) - {dotted(path), "sdjax"} for path in paths}


def circle(graph):
    """Returns the nodes of one circle of a graph {node: its successors}, [] where there is none."""
    done = set()

    def walk(node, way):
        if node in way:
            return way[way.index(node) :]
        if node in done:
            return []
        found = next(filter(None, (walk(after, [*way, node]) for after in sorted(graph.get(node, ())))), [])
        done.add(node)
        return found

    return next(filter(None, (walk(node, []) for node in sorted(graph))), [])


def rooms(graph):
    """Returns the graph of the parts of the house, from that of the modules."""
    found = {}
    for name, targets in graph.items():
        found.setdefault(unit(name), set()).update(unit(target) for target in targets)
    return {room: others - {room} for room, others in found.items()}


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_nothing_imports_in_a_circle():
    """Neither modules nor rooms, those of one floor included."""
    graph = edges(SOURCES)
    assert circle(graph) == []
    assert circle(rooms(graph)) == []


def test_model_files_and_adapter_files_are_strangers():
    for name, targets in edges(SOURCES).items():
        for one, other in (STRANGERS, STRANGERS[::-1]):
            assert not (name.startswith(one) and any(target.startswith(other) for target in targets)), name


def test_few_modules_are_loose():
    assert len([path for path in (ROOT / "sdjax").glob("*.py")]) <= LOOSE


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_imports_run_one_way(path):
    own = unit(dotted(path))
    if not own:
        assert not {name for name in imported(path) if name.startswith("sdjax")}
        return
    assert own in FLOOR, f"{own} has no floor in this test"
    for name in imported(path):
        top = name.split(".")[0]
        allowed = {"gradio"} if dotted(path).startswith(PAGE) else set()
        assert top not in EXTRAS - allowed, f"{path} imports {name}: an extra"
        assert top not in {"train", "sample", "configs", "tests", "benchmarks"}, f"{path} imports {name}"
        if top == "sdjax" and unit(name) in FLOOR:
            assert FLOOR[unit(name)] <= FLOOR[own], f"{path} imports {name}, which lies above it"


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_only_models_and_the_hypernetwork_make_layers(path):
    inside = path.relative_to(ROOT / "sdjax").as_posix().startswith(MAKES_LAYERS)
    assert inside or not {"flax.linen", "flax.nnx"} & imported(path)


@pytest.mark.parametrize("path", SOURCES + PROGRAMS, ids=names(SOURCES + PROGRAMS))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 500


def test_nothing_of_ours_has_two_names():
    """A search for a module's name finds every use of it."""
    tests = sorted((ROOT / "tests").rglob("*.py"))
    own = {"sdjax"} | {path.stem for path in [*PROGRAMS, *tests]} | {path.parent.name for path in tests}
    found = {str(path.relative_to(ROOT)): renamed(path, own) for path in [*SOURCES, *PROGRAMS, *tests]}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_keeps_no_state(path):
    """No empty container to be filled, and no `global`: what is kept belongs to a call or to the Maker."""
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    empty = "[]", "{}", "set()", "dict()", "list()"
    named = [node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value]
    assert not [ast.unparse(node) for node in named if ast.unparse(node.value) in empty]


@pytest.mark.parametrize("name", sdjax.PUBLIC)
def test_public_names_resolve(name):
    if not (ROOT / sdjax.PUBLIC[name].replace(".", "/")).with_suffix(".py").exists():
        pytest.skip(f"{sdjax.PUBLIC[name]} is not part of this version")
    assert callable(getattr(sdjax, name)) and name in dir(sdjax)


def test_an_unknown_public_name_lists_the_known():
    with pytest.raises(AttributeError, match="text2img"):
        sdjax.txt2img  # noqa: B018


def test_import_takes_at_most_a_second():
    """The time of `import sdjax` in a fresh process, interpreter's start left out; the least of three."""
    program = "import time; t = time.perf_counter(); import sdjax; print(time.perf_counter() - t)"
    assert min(float(python(program).stdout) for _ in range(3)) <= 1.0


def test_importing_every_module_has_no_effects():
    """No backend is started, no extra is loaded, nothing is printed, and no setting of JAX changes."""
    modules = [name for name in map(dotted, SOURCES) if not name.startswith(f"{PAGE}.")]  # those import gradio
    program = f"""
import importlib, json, os, random, sys
import flax, jax, numpy, optax, orbax.checkpoint, grain
before = (dict(jax.config.values), dict(os.environ), random.getstate()[1][:3], list(sys.path))
for name in {modules!r}: importlib.import_module(name)
after = (dict(jax.config.values), dict(os.environ), random.getstate()[1][:3], list(sys.path))
extras = sorted(set(sys.modules) & {EXTRAS | LOGGING!r})
print(json.dumps([before == after, jax._src.xla_bridge.backends_are_initialized(), extras]))
"""
    run = python(program)
    assert json.loads(run.stdout) == [True, False, []] and run.stderr == ""


def test_the_package_is_found_where_it_stands():
    assert Path(importlib.util.find_spec("sdjax").origin).parent == ROOT / "sdjax"
