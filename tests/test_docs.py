"""Every command in the documents: its program exists and takes the arguments, its recipe and settings are known."""

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sdjax.settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("sdjax/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
START = re.compile(r"^([A-Z_]+=\S+ )*(make|python|python3|sdjax) ")


def commands(page):
    """Returns the commands of a page: indented lines and code spans that start as one, without their comments."""
    lines = [line[4:] for line in page.read_text().splitlines() if line.startswith("    ")]
    spans = re.findall(r"`([^`\n]+)`", page.read_text())
    return sorted({part.split("  #")[0].split(" [")[0].strip() for part in [*lines, *spans] if START.match(part)})


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command):
    words = [word for word in shlex.split(command) if not re.match(r"^[A-Z_]+=", word)]
    settings = [word for word in shlex.split(command) if re.match(r"^[A-Z]+=", word)]
    if words[0] == "make":
        line = ["make", "-n", *words[1:], "ARGS=", *settings]  # not the ARGS of the make that runs the tests
        run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        for program, given in re.findall(r"((?:sample|benchmarks)/\w+\.py)(.*)", run.stdout):
            assert not set(re.findall(r"--[a-z-]+", given)) - options(ROOT / program)
    elif words[0] == "sdjax":
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert not given - options(*words[: 3 if words[1] == "adapters" else 2])
    elif words[1] == "-m":
        assert importlib.util.find_spec(words[2]), words[2]
    elif words[1] == "train/run.py":
        if words[2] != "CONFIG":
            sdjax.settings.load(ROOT / words[2], [word for word in words[3:] if "=" in word])
    else:
        accepted = options(ROOT / words[1])
        given = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        assert not given - accepted, f"{words[1]} has no {given - accepted}"


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
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
