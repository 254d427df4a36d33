"""Checkpoints by the clock, decided by one process; a trial export before the first step."""

import dataclasses

import pytest
import small_runs

from sdjax.runtime import processes
from sdjax.settings import SettingError
from sdjax.training import asked, run_folder
from sdjax.training.asked import LATE, Asked
from sdjax.training.loop import train
from sdjax.training.settings import Train


class Clock:
    """A clock that is half a minute later at every look."""

    now = 0.0

    def monotonic(self):
        self.now += 30
        return self.now


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return dataclasses.replace(small_runs.settings(tmp_path_factory.mktemp("data") / "photos"), checkpoint=100)


def test_slow_steps_get_checkpoints_and_resume_from_them_bit_for_bit(told, tmp_path, monkeypatch):
    wanted = small_runs.whole(told, tmp_path / "whole")
    assert small_runs.checkpoints(tmp_path / "whole") == [4]
    out, late = tmp_path / "run", dataclasses.replace(told, checkpoint_minutes=1.0, keep=9)
    with monkeypatch.context() as patch:
        patch.setattr(asked, "time", Clock())
        patch.setattr(run_folder, "export", lambda *a, **how: (_ for _ in ()).throw(ValueError("no room")))
        patch.setattr("sdjax.training.session.Session.rehearse", lambda *a: None)
        with pytest.raises(ValueError, match="no room"):
            train(late, out)
    assert small_runs.checkpoints(out) == [2, 4]
    for step in (out / "checkpoints").iterdir():
        if step.name == "4":
            step.rename(tmp_path / "4")
    train(told, out)  # goes on from step 2
    assert small_runs.weights(out) == wanted and small_runs.checkpoints(out) == [2, 4]


def test_zero_is_off_and_so_is_a_run_without_checkpoints(told, tmp_path, monkeypatch):
    monkeypatch.setattr(asked, "time", Clock())
    train(dataclasses.replace(told, checkpoint=0, checkpoint_minutes=0.1), tmp_path / "run")
    assert not small_runs.checkpoints(tmp_path / "run")
    assert LATE not in Asked(tmp_path, 0.0).now() and LATE in Asked(tmp_path, 0.1).now()
    with pytest.raises(SettingError, match="checkpoint_minutes=-1: expected"):
        Train(checkpoint_minutes=-1)


def test_one_process_decides_for_all(tmp_path, monkeypatch):
    """Process 0's answer is everyone's, whatever their own clocks say, and only where all ask."""
    monkeypatch.setattr(asked, "time", Clock())
    monkeypatch.setattr(processes, "several", lambda: True)
    own, answers = Asked.__new__(Asked), [[LATE], []]
    own.files, own.minutes, own.last = {}, 0.1, 0.0
    monkeypatch.setattr(processes, "led", lambda act: answers.pop(0))
    assert own.now() == {LATE} and own.now() == set() and own.now(together=False) == set()


def test_a_run_that_cannot_export_ends_before_its_first_step(told, tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("it cannot be written")

    monkeypatch.setattr(run_folder, "export", full)
    with pytest.raises(ValueError, match="it cannot be written"):
        train(told, tmp_path / "run")
    assert small_runs.logged(tmp_path / "run") == [] and not small_runs.checkpoints(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("trial")) == []


def test_the_trial_leaves_nothing(told, tmp_path, monkeypatch):
    places, export = [], run_folder.export
    monkeypatch.setattr(run_folder, "export", lambda *a, **how: (places.append(a[3]), export(*a, **how))[1])
    train(dataclasses.replace(told, steps=1), tmp_path / "run")
    trial, last = places
    assert last == tmp_path / "run" / "export" and trial != last and not trial.parent.exists()
