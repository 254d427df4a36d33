"""Every recipe loads, says what it does, and runs two steps with a tiny model."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdjax.settings
from sdjax.training.loop import train

ROOT = Path(__file__).parents[1] / "configs"
RECIPES = sorted(ROOT.rglob("*.py"))
SMALL = [
    "model=random:tiny",
    "vision=''",
    "steps=2",
    "data.batch=2",
    "checkpoint=0",
    "preview=0",
    "data.size=32",
    "data.cache=''",
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_describes_itself(path):
    text = sdjax.settings.describe(path)
    assert "python train/run.py" in text or "make " in text
    assert "optim.lr = " in text
    for meaning in (
        "A run's settings",
        "data: Pictures and prompts",
        "optim: An optimizer's",
        "noise_offset: ",
        "templates: ",
    ):
        assert meaning in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_runs(path, tmp_path):
    settings = sdjax.settings.load(path)
    more = [] if not settings.init else ["init=''"]
    more += ["data.count=8"] if settings.data.path == "pocketland" else []
    if not settings.data.path:
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
            (tmp_path / f"{i}.txt").write_text("a face")
        single = path.stem in ("tune", "e4t_tune")
        more.append(f"data.path={tmp_path / '0.png' if single else tmp_path}")
    train(sdjax.settings.load(path, [*SMALL, *more]), tmp_path / "out")
    assert any((tmp_path / "out" / "export").iterdir())
