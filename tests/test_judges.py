"""The judges of Pocketland pictures: their weights fit their networks, and they are right where that is easy."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sdjax.data import pocketland

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import judges


@pytest.fixture(scope="module")
def networks():
    return judges.load()


def test_scenes_are_named(networks):
    places = [pocketland.scene(i) for i in range(64)]
    people = [pocketland.identity(pocketland.VALIDATION[0] + i) for i in range(64)]
    seen = judges.classify(networks, np.stack([pocketland.draw(*both) for both in zip(people, places, strict=True)]))
    for kind in ("context", "style", "accessory"):
        assert np.mean([word == getattr(place, kind) for word, place in zip(seen[kind], places, strict=True)]) > 0.95


def test_the_same_person_is_nearer_than_another(networks):
    vectors = [judges.identity(networks, some) for some in judges.pairs_of(32, pocketland.VALIDATION[0])]
    np.testing.assert_allclose(np.linalg.norm(vectors[0], axis=1), 1, rtol=1e-4)
    one, same, other = vectors
    assert (one * same).sum(1).mean() > 0.8 > 0.3 > (one * other).sum(1).mean()


def test_larger_pictures_are_judged_by_their_means(networks):
    small = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    large = small.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(judges.reduced(large, 64), small)
    np.testing.assert_array_equal(judges.identity(networks, large), judges.identity(networks, small))
    assert judges.reduced(np.array([0, 255, 255, 5], np.uint8).reshape(1, 2, 2, 1).repeat(3, 3), 1).ravel()[0] == 129


def test_pictures_of_another_size_are_refused(networks):
    with pytest.raises(ValueError, match=r"pictures=uint8\[1, 32, 32, 3\]: expected uint8"):
        judges.classify(networks, np.zeros((1, 32, 32, 3), np.uint8))


def test_training_writes_what_loads(tmp_path, monkeypatch):
    """What two steps on 256 pictures write loads; what one of them wrote does not take the place of a judge in use."""
    monkeypatch.setattr(judges, "FOLDER", tmp_path)
    kept, keep = [], judges.keep
    monkeypatch.setattr(judges, "keep", lambda judge, path: kept.append(path) or keep(judge, path))
    for name in judges.JUDGES[64]:
        judges.train(name, 2, 256, tmp_path / "data", cats=2, pairs=8, every=1, size=128 if name == "who" else 64)
    assert set(judges.load.__wrapped__(tmp_path)) == {"what", "who"}
    assert judges.load.__wrapped__(tmp_path)["who"].size == 128
    files = (tmp_path / "data" / "what.safetensors", tmp_path / "data" / "who.safetensors")
    assert [path for path in kept if path.parent != tmp_path] == [files[0], files[0], files[1], files[1]]
    assert kept[2] == tmp_path / "what.safetensors" and len(kept) == 6
