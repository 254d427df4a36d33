"""The documents: programs parse their commands, lists are the registries', examples run, sentences are short."""

import ast
import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdjax.convert
import sdjax.settings
from sdjax.diffusion import plan, samplers
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.service import adapters, batch, programs
from sdjax.training import recipes
from sdjax.training.loop import train
from tests import doc_lists, prose

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("sdjax/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
NOTEBOOK = ROOT / "docs" / "colab.ipynb"
START = re.compile(r"^([A-Z_]+=\S+ )*(make|python|python3|sdjax) ")
WITH_RECIPE = ("train/run.py", "train/cache.py", "train/class_images.py")
LONGEST = 140  # lines of the README
CODE = ["sdjax", "train", "sample", "configs", "benchmarks", "tests/faults", "tests/fuzz"]  # of checked docstrings


def commands(text):
    """Returns the commands of a page: indented lines and code spans that start as one, without their comments."""
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    spans = re.findall(r"`([^`\n]+)`", text)
    return {part.split("  #")[0].split(" [")[0].strip() for part in [*lines, *spans] if START.match(part)}


def cells(kind):
    """Returns the sources of the notebook's cells of a kind."""
    return ["".join(one["source"]) for one in json.loads(NOTEBOOK.read_text())["cells"] if one["cell_type"] == kind]


def notebook():
    """Returns the commands of the notebook: what its cells give to the shell."""
    lines = [line[1:] for cell in cells("code") for line in cell.splitlines() if line.startswith("!")]
    return {line.replace("{MODEL}", "FOLDER").replace("{INIT}", "FOLDER") for line in lines if START.match(line)}


COMMANDS = sorted(set.union(*(commands(page.read_text()) for page in PAGES), notebook()))


def example(page, title):
    """Returns the Python block of a page that begins with a docstring."""
    (found,) = re.findall(rf'```python\n("""{title}.*?)```', (ROOT / "docs" / page).read_text(), re.DOTALL)
    return found


@pytest.fixture(scope="module")
def bias(tmp_path_factory):
    """The method of docs/method.md as the file that it asks for."""
    path = tmp_path_factory.mktemp("example") / "bias.py"
    path.write_text(example("method.md", "Trains the UNet's biases"))
    return path


def test_there_are_commands():
    assert len(COMMANDS) > 80 and len(notebook()) > 4


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command, bias):
    words = [word for word in shlex.split(command) if not re.match(r"^[A-Z_]+=", word)]
    settings = [word for word in shlex.split(command) if re.match(r"^[A-Z]+=", word)]
    if words[0] == "make":
        line = ["make", "-n", *words[1:], "ARGS=", *settings]  # not the ARGS of the make that runs the tests
        run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        for line in run.stdout.splitlines():
            if re.match(r"\.venv/bin/python (sample|benchmarks|train)/", line):
                understood(shlex.split(line)[1:], bias)
    elif words[0] == "sdjax":
        of_sdjax(words[1:], bias)
    elif words[1] == "-m":
        assert importlib.util.find_spec(words[2]), words[2]
        if words[2] == "sdjax":
            of_sdjax(words[3:], bias)
        elif words[2] == "sdjax.convert" and words[3:]:
            both = ["SRC", "DST"] if words[3].startswith("--") else []  # a flag by itself
            sdjax.convert._parser().parse_args([*words[3:], *both])
    else:
        understood(words[1:], bias)


def understood(words, bias):
    """Parses the words of a program's file as that program does."""
    path, rest = words[0], words[1:]
    task = Path(path).stem
    if path in WITH_RECIPE:
        if rest[0] != "CONFIG":
            recipe = bias if rest[0] == bias.name else ROOT / rest[0]
            sdjax.settings.load(recipe, [word for word in rest[1:] if "=" in word])
    elif task == "make_pocket":
        sdjax.settings.override(sdjax.settings.names(ROOT / path)["Make"](), [word for word in rest if "=" in word])
    elif path.startswith("sample/") and task not in ("demo", "batch"):
        drawing(task, rest)
    elif task == "batch":
        batch.parser(None).parse_args(rest or ["jobs.jsonl"])
    else:
        given = {word.split("=")[0] for word in rest if word.startswith("--")}
        given -= set(re.findall(r'"(--[a-z0-9-]+)"', (ROOT / path).read_text()))  # --help of a benchmark imports torch
        assert not given or not given - options(ROOT / path), f"{path} has no {given - options(ROOT / path)}"


def drawing(task, rest):
    """Checks the flags and values of a program that makes pictures."""
    given = vars(programs.parser(task, None).parse_args(rest))
    settings = {name: value for name, value in given.items() if name in programs.fields(programs.TASKS[task])}
    if "prompt" in settings:
        programs.asked(task, settings, given.get("count", 1))


def of_sdjax(words, bias):
    """Parses what stands behind `sdjax`."""
    if not words or words[0].startswith("-"):
        return
    if words[0] == "adapters" and words[1:]:
        adapters._parser().parse_args(words[1:])
    elif words[0] in programs.TASKS:
        drawing(words[0], words[1:])
    elif words[0] in ("train", "cache", "class_images") and words[1:]:
        sdjax.settings.load(recipes.find(words[1]), [word for word in words[2:] if "=" in word])
    else:
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert not given or not given - options("sdjax", words[0])


def test_names_with_spaces_are_one_argument():
    for words in (["tune", "IMAGE=my photo.png"], ["train-encoder", "DATA=my photos", "MODEL=my model"]):
        run = subprocess.run(["make", "--no-print-directory", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert f"data.path={words[1].partition('=')[2]}" in shlex.split(run.stdout.splitlines()[-1])


@functools.cache
def options(*program):
    """Returns the options that the --help of a program's file, or of "sdjax" and what it is to do, names."""
    named = ["-m", *program] if program[0] == "sdjax" else program
    run = subprocess.run([sys.executable, *named, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(re.findall(r"--[a-z][a-z0-9-]*", run.stdout))


def test_links_lead_somewhere():
    for page in PAGES:
        for target, part in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
            if "://" not in target:
                to = page.parent / target if target else page
                assert to.exists(), f"{page}: {target}"
                assert not part or part in anchors(to), f"{page}: {target}#{part}"


def anchors(page):
    """Returns the anchors of a page's titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", doc_lists.pages(), ids=lambda page: page.name)
def test_lists_are_those_of_the_registries(page):
    text = page.read_text()
    assert text == doc_lists.filled(text), "run python tests/doc_lists.py"


def test_every_list_is_somewhere():
    found = {name for page in doc_lists.pages() for _, name, _ in doc_lists.MARKED.findall(page.read_text())}
    assert found == set(doc_lists.LISTS)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_sentences_are_short_and_plain(page):
    assert not prose.faults(page.read_text())


def test_the_notebook_is_plain():
    assert not [fault for cell in cells("markdown") for fault in prose.faults(cell)]


def docstrings(path):
    """Yields the docstrings and the help texts of a Python file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
            yield node.value.value


@pytest.mark.parametrize("part", CODE)
def test_docstrings_have_no_signs_of_a_translation(part):
    found = [
        f"{path.relative_to(ROOT)}: {name}: {sentence}"
        for path in sorted((ROOT / part).rglob("*.py"))
        for text in docstrings(path)
        for sentence in prose.sentences(text)
        for name, sign in prose.SIGNS.items()
        if re.search(sign, sentence)
    ]
    assert found == []


def test_faults_are_found():
    assert prose.faults("What the model holds is not told.") and prose.faults("It is said. Made anew, it runs.")
    assert prose.faults(" ".join(["word"] * 31) + ".") and not prose.faults(" ".join(["word"] * 30) + ". Next.")
    assert prose.faults(f"| a | {' '.join(['word'] * 31)} |") and not prose.faults("Short `of which`.")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST


def test_the_example_of_a_method_trains(bias, tmp_path):
    for i in range(2):
        Image.fromarray(np.full((32, 32, 3), 90 * i, np.uint8)).save(tmp_path / f"{i}.png")
    small = ["model=random:tiny", "steps=2", "data.batch=2", "data.size=32", "checkpoint=0", "preview=0"]
    train(sdjax.settings.load(bias, [*small, "data.word=cat", f"data.path={tmp_path}"]), tmp_path / "out")
    assert (tmp_path / "out" / "export" / "trained.safetensors").is_file()


def test_the_example_of_a_sampler_is_found(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(example("architecture.md", "Euler's method"))
    monkeypatch.setattr(samplers, "__path__", [*samplers.__path__, str(tmp_path)])
    try:
        assert samplers.known()["mine"].word == "Mine"
        ours, theirs = (plan.tabulate(Schedule(), name, 5) for name in ("mine", "euler"))
    finally:
        sys.modules.pop("sdjax.diffusion.samplers.mine", None)
        vars(samplers).pop("mine", None)
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-6)
