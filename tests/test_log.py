"""What a run tells: figures, a mean on the bar, pictures on the boards, and how what is missing is installed."""

import builtins
import json

import numpy as np
import pytest

from sdjax.training import log


class Kept:
    """A board that keeps what it is shown."""

    def __init__(self):
        self.seen = []

    def figures(self, step, values):
        self.seen.append((step, values))

    def picture(self, step, name, picture):
        self.seen.append((step, name, picture.shape))

    def close(self):
        self.seen.append("closed")


def test_the_bar_shows_the_mean_of_the_last_steps(tmp_path):
    board = Kept()
    told = log.Log(tmp_path, 0, 200, "run", [board])
    for step in range(1, 101):
        told.advance(step, float(step))
    assert told.bar.n == 100 and told.bar.postfix == f"loss={np.mean(range(51, 101)):.4g}"  # the last 50: 75.5
    told.metrics(100, {"loss": 0.25})
    told.picture(100, "samples", np.zeros((8, 9, 3), np.uint8))
    told.close()
    assert board.seen == [(100, {"loss": 0.25}), (100, "samples", (8, 9, 3)), "closed"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "event": "started"} and lines[1]["loss"] == 0.25


def test_tensorboard_gets_figures_and_pictures(tmp_path):
    (board,) = log.boards(tmp_path, "", {})
    board.figures(1, {"loss": 0.5})
    board.picture(1, "samples", np.zeros((8, 9, 3), np.uint8))
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"samples" in file.read_bytes() and b"loss" in file.read_bytes()


def test_what_is_not_installed_is_said(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *more):
        if name in ("tensorboardX", "wandb"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert log.boards(tmp_path, "", {}) == []
    assert capsys.readouterr().out == "no TensorBoard: pip install -e '.[logging]'\n"
    with pytest.raises(ValueError, match=r"wandb='cats': not installed; pip install -e '.\[logging\]'"):
        log.boards(tmp_path, "cats", {})


def test_wandb_is_told_too(tmp_path, monkeypatch):
    told = []

    class Module:
        Image = staticmethod(lambda picture: ("image", picture.shape))

        @staticmethod
        def init(**how):
            told.append(how)
            return Module

        log = staticmethod(lambda values, step: told.append((step, values)))
        finish = staticmethod(lambda: told.append("finished"))

    monkeypatch.setitem(__import__("sys").modules, "wandb", Module)
    for folder in ("cat", "other/cat"):
        (tmp_path / folder).mkdir(parents=True)
    board = log.Wandb(tmp_path / "cat", "cats", {"steps": 3})
    board.figures(2, {"loss": 1.0})
    board.picture(2, "samples", np.zeros((8, 9, 3), np.uint8))
    board.close()
    assert told[0]["project"] == "cats" and told[0]["name"] == "cat" and told[0]["config"] == {"steps": 3}
    assert told[1:] == [(2, {"loss": 1.0}), (2, {"samples": ("image", (8, 9, 3))}), "finished"]
    for folder in ("cat", "other/cat"):
        log.Wandb(tmp_path / folder, "cats", {})
    first, _, _, _, again, other = (one["id"] if isinstance(one, dict) else one for one in told)
    assert first == again == (tmp_path / "cat" / log.WANDB_ID).read_text() and len({first, other, "cat"}) == 3


def test_a_line_that_a_full_disk_cut_stands_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    told = log.Log(tmp_path, 2, 3, "run")
    told.close()
    log.Log(tmp_path, 2, 3, "run").close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"step": 2, "lo' and [json.loads(line)["event"] for line in lines[2:]] == ["resumed"] * 2
