"""Hashes that are kept on disk: made once per content, never trusted where damaged, written by several processes."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdjax.formats.storage import hashes


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file that hashes are kept in, and none in memory."""
    monkeypatch.setenv("SDJAX_HASHES", str(tmp_path / "cache" / "hashes.json"))
    hashes._sha256.cache_clear()
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def made(monkeypatch):
    """The hashes that were made, and not found."""
    counted, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *data: sha256(*data) if data else counted.append(1) or sha256())
    return counted


def later():
    """What another process would read."""
    hashes._sha256.cache_clear()
    return hashes


def test_a_file_is_hashed_once_per_content(kept, made, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"123")
    wanted = {start: hashlib.new("sha256", b"123"[start:]).hexdigest() for start in (0, 1)}
    for start in (0, 1, 0, 1):
        assert later().sha256(path, start) == wanted[start]
    assert len(made) == 2
    path.write_bytes(b"456")  # the same size
    os.utime(path, ns=(1, 1))
    for _ in range(2):
        assert later().sha256(path) == hashlib.new("sha256", b"456").hexdigest()
    assert len(made) == 3 and list(json.loads(kept.read_text())) == [str(path)]
    path.write_bytes(b"4567")
    os.utime(path, ns=(1, 1))  # the same time
    assert later().sha256(path) == hashlib.new("sha256", b"4567").hexdigest()


def test_what_is_damaged_is_made_again(kept, made, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"123")
    wanted = hashes.sha256(path)
    entry = json.loads(kept.read_text())[str(path)]
    bad = [{**entry, "sha256": one} for one in ({"0": wanted[:-1]}, {"0": 5}, {"0": "x" * 64}, [wanted], None, {})]
    texts = ["", "{", "[]", "null", "[" * 100_000, *(json.dumps({str(path): one}) for one in [*bad, 5, None, {}])]
    for i, text in enumerate(texts):
        kept.write_text(text)
        assert later().sha256(path) == wanted and len(made) == i + 2, text[:99]
        assert json.loads(kept.read_text()) == {str(path): entry}
    kept.write_bytes(b"\xff\xfe")
    assert later().sha256(path) == wanted


def test_where_nothing_can_be_written_a_hash_is_kept_by_the_process(made, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDJAX_HASHES", str(tmp_path / "file" / "hashes.json"))
    (tmp_path / "x.pt").write_bytes(b"123")
    assert later().sha256(tmp_path / "x.pt") == hashes.sha256(tmp_path / "x.pt") and len(made) == 1


def test_the_place_is_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("SDJAX_HASHES")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert hashes.place() == Path("/there/sdjax/hashes.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hashes.place() == Path.home() / ".cache/sdjax/hashes.json"


def test_processes_lose_nothing_of_each_other(kept, tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.pt").write_bytes(bytes([i]))
    program = """
import sys, threading
from sdjax.formats.storage import hashes
def some(names):
    for name in names:
        hashes.sha256(name)
threads = [threading.Thread(target=some, args=(sys.argv[1 + i :: 2],)) for i in range(2)]
for one in threads: one.start()
for one in threads: one.join()
"""
    names = [str(tmp_path / f"{i}.pt") for i in range(40)]
    started = [subprocess.Popen([sys.executable, "-c", program, *names[i::2]]) for i in range(2)]
    assert [one.wait() for one in started] == [0, 0]
    found = json.loads(kept.read_text())
    assert {path: one["sha256"]["0"] for path, one in found.items()} == {
        path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in names
    }
