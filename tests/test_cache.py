"""Files of decoded pictures: made whole or not at all, never larger than the disk, never of another drawing code."""

import shutil

import numpy as np
import pytest

from sdjax.data import cache, sources
from sdjax.data.batches import Data
from sdjax.data.sources import drawn
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline


@pytest.fixture
def source():
    return sources.open(Data(path="pocketland", size=32, source=Pocketland(count=6)))


def test_pictures_are_kept_and_found_again(source, tmp_path):
    made = cache.cached(source, None, tmp_path, 32, encode=False)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = cache.cached(source, None, tmp_path, 32, encode=False)
    assert file.stat().st_mtime_ns == before
    for i in range(len(source)):
        assert np.array_equal(made.picture(i, 32), source.picture(i, 32)) and np.array_equal(
            again.picture(i, 32), made.picture(i, 32)
        )


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_interrupted_leaves_nothing(source, tmp_path, monkeypatch, error):
    def broken(i, size):
        if i == 3:
            raise error("picture 3")
        return np.zeros((32, 32, 3), np.uint8)

    monkeypatch.setattr(source, "picture", broken)
    with pytest.raises(error):
        cache.cached(source, None, tmp_path, 32, encode=False)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_said_before_it_is_full(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100))
    with pytest.raises(ValueError, match="GB to write, 0.00 GB free"):
        cache.cached(source, pipeline.load("random:tiny"), tmp_path, 32)
    assert not list(tmp_path.iterdir())


def test_other_drawing_code_is_another_source(source, monkeypatch, tmp_path):
    before = source.fingerprint()
    (tmp_path / "__init__.py").write_text("other")
    monkeypatch.setattr(drawn.pocketland, "__file__", str(tmp_path / "__init__.py"))
    assert source.fingerprint() != before and source.fingerprint()[:5] == before[:5]


def test_another_view_is_among_the_pictures_whatever_their_number(source):
    """Six pictures are four of one identity and two of the next; seven leave the second with three, five with one."""
    for count in (5, 6, 7, 8):
        some = sources.open(Data(path="pocketland", size=32, source=Pocketland(count=count)))
        for i in range(count):
            found = {some.other(i, np.random.default_rng(seed)) for seed in range(40)}
            group = {j for j in range(i - i % 4, i - i % 4 + 4) if j < count}
            assert found == (group - {i} or {i})
