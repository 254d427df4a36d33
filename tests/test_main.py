"""The program `sdjax`: one name for all programs."""

import contextlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT

from sdjax.__main__ import TASKS, about, main
from sdjax.service import programs


def test_each_name_is_a_program(capsys):
    for name in (*TASKS, "batch", "convert", "demo", "class_images"):
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0 and "--" in capsys.readouterr().out
    assert main([]) == main(["--help"]) == main(["train"]) == main(["tune", "--help"]) == 0
    assert main(["cache"]) == main(["vocabulary"]) == 0
    capsys.readouterr()
    assert main(["paint"]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: 'paint': expected one of text2img, img2img")
    names = error.strip().rpartition("one of ")[2].split(", ")
    assert set(names) == set(about()) and all(f"    {name} " in out for name in names)
    assert set(TASKS) == set(programs.TASKS)


@pytest.mark.parametrize("path", ["train/run.py", "train/cache.py", "train/class_images.py", "train/vocabulary.py",
                                  "sample/demo.py"])  # fmt: skip
def test_a_program_of_the_checkout_has_the_same_help(path, capsys, monkeypatch):
    """Except for its name."""

    def told(run, *arguments):
        with contextlib.suppress(SystemExit):
            run(*arguments)
        return " ".join(capsys.readouterr().out.split())

    name = {"run": "train"}.get(Path(path).stem, Path(path).stem)
    own = told(main, [name, "--help"])
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    theirs = told(runpy.run_path, str(ROOT / path), None, "__main__")
    assert f"sdjax {name}" in own and theirs.replace(f"python {path}", f"sdjax {name}") == own


def test_tuning_takes_the_recipe_of_the_model(monkeypatch):
    seen = []
    monkeypatch.setattr("sdjax.__main__._train", lambda given: seen.append(given) or 0)
    assert main(["tune", "me.png", "steps=3"]) == main(["tune", "me.png", "model=FOLDER"]) == 0
    own, others = seen
    assert own == ["pocket/tune", "model=pocket", "init=pocket", "data.path=me.png", "steps=3"]
    assert others[0] == "e4t_tune" and "init=FOLDER" in others


def test_importing_sdjax_imports_no_checker():
    script = "import sdjax, sys; print(sorted({'pydantic', 'jax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_programs_of_sample_are_short():
    for path in (ROOT / "sample").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
