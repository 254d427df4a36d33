"""`make pocket`: its stages are runs of the recipes, within the time that is given; the slow test makes a model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdjax
from sdjax import settings
from sdjax.training import checks

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import make_pocket
import pocket_card

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def arguments(stage, **more):
    return make_pocket.run_of(make_pocket.Make(workers=3, compute="bfloat16", **more), stage)


@pytest.mark.parametrize("stage", make_pocket.STAGES, ids=lambda stage: stage.name)
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_stages_are_runs_that_fit_their_recipes(stage, scale):
    recipe, *overrides = arguments(stage, scale=scale, work="w", seed=5)
    run = settings.load(ROOT / recipe, overrides)
    checks.alone(run)
    assert run.out == f"w/{stage.name}" and run.seed == 5 and run.compute == "bfloat16"
    assert run.model == (f"w/{stage.base}/export" if stage.base else make_pocket.SHAPE)
    assert run.data.batch == max(8, round(scale * stage.rows)) and run.data.resident and run.data.workers == 3
    assert run.data.source.count == round(scale * make_pocket.PICTURES * stage.pictures)
    assert bool(run.data.source.large) == stage.sizes == (run.data.size == 256)


def test_every_stage_starts_from_the_one_before():
    names = [stage.name for stage in make_pocket.STAGES]
    assert [stage.base for stage in make_pocket.STAGES] == ["", *names[:-1]]
    assert sum(stage.share for stage in make_pocket.STAGES) == pytest.approx(1)


@pytest.fixture
def programs(monkeypatch):
    """Records what is run, with a clock that only programs move: each takes its minutes and 15 s more."""
    called, now = [], [0.0]

    def program(*command):
        called.append(command)
        minutes = [float(text.removeprefix("minutes=")) for text in command if text.startswith("minutes=")]
        now[0] += 60 * sum(minutes) + 15 * bool(minutes)

    monkeypatch.setattr(make_pocket, "_program", program)
    monkeypatch.setattr(make_pocket.time, "monotonic", lambda: now[0])
    return called, now


def test_the_stages_keep_to_the_time(programs, tmp_path):
    called, now = programs
    make_pocket.train(make_pocket.Make(minutes=9, work=str(tmp_path)), False)
    assert [command[1] for command in called] == [f"configs/pocket/{stage.name}.py" for stage in make_pocket.STAGES]
    assert 8.5 * 60 < now[0] <= 9 * 60


def test_finished_stages_stay(programs, tmp_path):
    called, now = programs
    for name in ("vae", "clip"):
        (tmp_path / name / "export").mkdir(parents=True)
        (tmp_path / name / "export" / "model_index.json").write_text("{}")
    make_pocket.train(make_pocket.Make(minutes=9, work=str(tmp_path)), False)
    assert [command[1] for command in called] == ["configs/pocket/unet.py", "configs/pocket/e4t.py"]
    assert now[0] <= 0.7 * 9 * 60


def test_nothing_is_written_over_the_package_unless_told():
    assert make_pocket.Make().out == "outputs/pocket" and not Path(make_pocket.Make().work).is_relative_to("sdjax")


@pytest.mark.parametrize("given, said", [
    ("scale=2", "scale=2.0: expected a number above 0, at most 1"),
    ("minute=3", "minute: Make has no 'minute'; did you mean 'minutes'?"),
    ("minutes=0", "minutes=0.0: expected"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_one_line(given, said, capsys):
    assert make_pocket.main([given]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and said in told and told.count("\n") == 1


def test_a_card_counts_the_seconds_of_every_process_of_a_run():
    log = [{"event": "started"}, {"seconds": 2.0}, {"seconds": 5.0}, {"event": "resumed"}, {"seconds": 7.0}]
    assert pocket_card.seconds(log) == 12.0


@pytest.mark.slow
def test_the_whole_chain_in_small(tmp_path):
    """Every file of a model of 128 pixels, in shards, within the size of the package; a second run only measures."""
    out, work = tmp_path / "model", tmp_path / "work"
    command = [sys.executable, "train/make_pocket.py", "scale=0.01", "minutes=4", f"out={out}", f"work={work}"]
    subprocess.run(command, check=True)
    sizes = [path.stat().st_size for path in out.rglob("*.safetensors")]
    assert max(sizes) <= 16 << 20 and sum(sizes) <= 32e6
    theirs = {path.relative_to(ROOT / "sdjax" / "pocket").parts[0] for path in (ROOT / "sdjax/pocket").rglob("*.*")}
    assert {path.relative_to(out).parts[0] for path in out.rglob("*.*")} == theirs | {"grid.png"}
    sd = sdjax.load(out)
    assert sdjax.text2img(sd, ["a photo of a face"], seeds=[0], steps=2)[0].shape == (128, 128, 3)
    assert {(work / "judges" / f"{name}.safetensors").exists() for name in ("what", "who")} == {True}
    card = (out / "README.md").read_text()
    assert "128x128" in card and "not measured" not in card and "`seed=0`" in card
    assert re.search(r"E4T, 15 steps, 1 identities \| identity -?\d\.\d\d", card)
    before = {name: (work / name / "export" / "model_index.json").stat().st_mtime_ns for name in ("vae", "e4t")}
    subprocess.run([*command, "figures=False", "judges=False"], check=True)
    assert before == {name: (work / name / "export" / "model_index.json").stat().st_mtime_ns for name in before}
    run = json.loads((work / "e4t" / "config.json").read_text())
    assert run["data"]["batch"] == 8
