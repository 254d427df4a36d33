"""Damaged files of every kind are read, or refused in one line that names them; and what finds those that are not.

`make fuzz` damages 20,000; a run with other seeds and its findings is in docs/log.
"""

import time

import numpy as np
import pytest
from fuzz import run, seeds
from fuzz.mutators import mutate

FILES = 500


def test_files_damaged_in_many_ways(tmp_path):
    (tmp_path / "damaged").mkdir()
    found = run.check(
        seeds.make(tmp_path / "seeds"), 1, list(range(FILES)), tmp_path / "damaged", lambda number, wrong: None
    )
    assert found == {}


def test_the_same_seed_damages_the_same(tmp_path):
    data = b'{"steps": 3, "prompt": "a cat"}\n' * 9
    some = [mutate(data, "list.jsonl", np.random.default_rng((7, i))) for i in range(50)]
    assert some == [mutate(data, "list.jsonl", np.random.default_rng((7, i))) for i in range(50)]
    assert sum(one != data for one in some) > 45


def unnamed(path):
    raise ValueError("a file is damaged")


def lines(path):
    raise OSError(f"{path}: damaged\nat 3")


def other(path):
    raise KeyError("weight")


def slow(path):
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass


def large(path):
    return b"x" * (320 << 20)


def one_line(path):
    raise ValueError(f"{path}: damaged")


@pytest.mark.parametrize(
    ("reader", "wrong"),
    [
        (unnamed, "unnamed: ValueError: a file is damaged"),
        (lines, "several lines"),
        (other, "traceback: KeyError: 'weight' at test_fuzz.py"),
        (slow, "slow: 0.2"),
        (large, "memory: 3"),
        (one_line, None),
        (str, None),
    ],
)
def test_what_is_wrong_is_found(reader, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 0.1 if reader is slow else 10.0)
    path = tmp_path / "cat.pt"
    path.write_bytes(b"x")
    found = run.verdict(reader, path, path, 1)
    assert found is None if wrong is None else wrong in found, found
