"""An installed package: a wheel unpacked into a folder that alone is on PYTHONPATH has every program and recipe."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from programs import ROOT

from sdjax.__main__ import about
from sdjax.training import recipes


def test_a_recipe_is_found_by_name_and_by_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert recipes.find("lora") == ROOT / "configs/lora.py"
    assert recipes.find("pocket/tune") == recipes.find(str(ROOT / "configs/pocket/tune.py"))
    assert set(recipes.known().values()) == set((ROOT / "configs").rglob("*.py"))
    (tmp_path / "lora").write_text("")  # a file of the user's comes first
    assert recipes.find("lora") == Path("lora")
    with pytest.raises(ValueError, match="^recipe 'loras': no such file or name; expected .* recipe's name: lora$"):
        recipes.find("loras")


def test_an_installed_package_takes_its_own_copy(monkeypatch, tmp_path):
    """Although another package's folder `configs` may be beside it."""
    inside, beside = tmp_path / "sdjax" / "configs", tmp_path / "configs"
    monkeypatch.setattr(recipes, "FOLDERS", (inside, beside))
    for folder in (beside, inside):
        folder.mkdir(parents=True)
        (folder / "lora.py").write_text("")
        assert recipes.find("lora") == folder / "lora.py"


@pytest.mark.slow
def test_a_wheel_has_all_programs_and_trains_by_name(tmp_path):
    source, place = tmp_path / "source", tmp_path / "place"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("sdjax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(wheel, cwd=source, check=True, capture_output=True)
    shutil.rmtree(source)
    with zipfile.ZipFile(next(tmp_path.glob("sdjax-*.whl"))) as file:
        file.extractall(place)
    env = {**os.environ, "PYTHONPATH": str(place), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}

    def python(*words):
        run = subprocess.run([sys.executable, "-P", *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def sdjax(*words):
        return python("-m", "sdjax", *words)

    assert python("-c", "import sdjax; print(sdjax.__file__)").strip() == str(place / "sdjax" / "__init__.py")
    listed = sdjax("--help")
    assert all(f"    {name} " in listed for name in about())
    assert "pocket/tune" in sdjax("train")
    small = ["model=pocket", "steps=1", "data.path=pocketland", "data.count=2", "data.batch=1", "preview=0"]
    assert "result: " in sdjax("train", "lora", *small)
    assert (tmp_path / "outputs/lora/export/lora.safetensors").is_file()
