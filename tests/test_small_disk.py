"""A real disk that is too small, where one may be mounted: what was whole stays whole, and the next start goes on.

Each twice: as it is, where the room is asked for first, and without asking, so that the write itself fails.
"""

import contextlib
import json
import os
import subprocess

import numpy as np
import pytest
import small_runs

from sdjax import convert
from sdjax.formats.storage import files
from sdjax.runtime import room
from sdjax.service import batch, maker, records
from sdjax.training import session
from sdjax.training.loop import train

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a disk")


@contextlib.contextmanager
def disk(place, size):
    """A tmpfs of `size` bytes at a place."""
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(params=["asked", "not asked"])
def asked(request, monkeypatch):
    if request.param == "not asked":
        monkeypatch.setattr(files, "_lack", lambda path, size: "")


def fill(place):
    """Fills a disk to its last byte with a file, which it returns."""
    path = place / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    return path


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return small_runs.settings(tmp_path_factory.mktemp("told") / "photos")


@pytest.fixture(scope="module")
def whole(told, tmp_path_factory):
    return small_runs.whole(told, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
def test_a_runs_checkpoint_and_export(asked, told, whole, tmp_path, monkeypatch):
    """Full at the checkpoint of step 4, then at the export: each time the run goes on from the last whole state."""
    with disk(tmp_path / "disk", "16m") as place:
        out, after, end = place / "run", session.Session.after, session.Session.end
        with monkeypatch.context() as patch:

            def full(session, step, *more):
                if step == 3:
                    session.checkpoints.wait()
                    fill(place)
                after(session, step, *more)

            patch.setattr(session.Session, "after", full)
            with pytest.raises(room.NoRoom, match=r"run.*(checkpoint 2|newest checkpoint) is whole") as error:
                train(told, out)
        assert "\n" not in str(error.value) and small_runs.checkpoints(out) == [2]
        (place / "filler").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(session.Session, "end", lambda *a: (a[0].checkpoints.wait(), fill(place), end(*a))[2])
            with pytest.raises(room.NoRoom, match=r"run/export/.*cannot be written: .*unchanged") as error:
                train(told, out)
        assert "\n" not in str(error.value) and small_runs.checkpoints(out) == [2, 4]
        assert not list(out.rglob(".*saving*")) and not list(out.rglob("*.safetensors"))
        (place / "filler").unlink()
        train(told, out)
        assert small_runs.weights(out) == whole


def test_a_list(asked, tmp_path, monkeypatch, capsys):
    """The third of four pictures has no room: status 3, and the rest comes when there is."""
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(json.dumps({"prompt": f"a cat {i}", "seed": i}) + "\n" for i in range(4)))

    class Drawn(maker.Maker):
        def make(self, requests, **more):
            if len(list(out.glob("*.png"))) == 2 and not room_again:
                fill(out)
            random = np.random.default_rng(requests[0].settings.seed)
            return random.integers(0, 255, (len(requests), 32, 32, 3), np.uint8)

        def record(self, request, size, private=True, **more):
            return records.of(request.settings, size)

    monkeypatch.setattr(maker, "Maker", Drawn)
    monkeypatch.setattr("sdjax.runtime.compile_cache.keep", lambda **_: None)
    with disk(tmp_path / "disk", "256k") as out:
        room_again, given = [], [str(jobs), "--out", str(out), "--model", "random:tiny", "--batch", "1"]
        assert batch.main("", given) == 3
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert said.startswith(f"error: {out}/000003.png: cannot be written: ") and "2 pictures made" in said
        kept = {path: path.read_bytes() for path in sorted(out.glob("*.png"))}
        assert [path.name for path in kept] == ["000001.png", "000002.png"] and not list(out.glob(".*"))
        (out / "filler").unlink()
        room_again.append(True)
        assert batch.main("", given) == 0 and len(list(out.glob("*.png"))) == 4
        assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_a_conversion(asked, name, tmp_path, capsys):
    """The model of half the size has room beside nothing, the whole one beside it has none."""
    source = tmp_path / "tiny"
    assert convert.main(["random:tiny", str(source), "--dtype", "float16"]) == 0
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    with disk(tmp_path / "disk", int(2.2 * size)) as place:
        assert convert.main([str(source), str(place / name)]) == 0
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert convert.main([str(source), str(place / name), "--dtype", "float32"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {place / name}: ") and said.count("\n") == 1, said
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
