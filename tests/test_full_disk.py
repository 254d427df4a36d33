"""A disk that is full at the n-th write of each writer: what was there stays whole, and one line names the path."""

import builtins
import contextlib
import errno
import io
import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax.data.store import Store, key
from sdjax.formats.storage import files, headers, pickle_writer
from sdjax.runtime import locks, room
from sdjax.sampling.settings import TextToImage
from sdjax.service import batch, class_images, lists, maker, records
from sdjax.training.checkpoint import Checkpoints


class Full:
    """A file whose writes count, and fail from the n-th on."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __iter__(self):
        return iter(self.file)

    def write(self, data):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@contextlib.contextmanager
def full_after(count, monkeypatch):
    """Lets `count` writes to files pass; yields the list of how many are left, negative where one has failed."""
    left, real = [count], io.open

    def opened(file, mode="r", *more, **options):
        made = real(file, mode, *more, **options)
        return Full(made, left) if set(mode) & set("wax+") and not isinstance(file, int) else made

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        yield left


TENSORS = {f"w{i}": np.full((4, 4), i, np.float32) for i in range(5)}


def tensors():
    return {name: files.Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in TENSORS.items()}


def weights(place):
    with files.new_file(place) as temporary:
        files.write_safetensors(temporary, tensors(), {})


def folder(place):
    with files.new_folder(place, "mark.json") as temporary:
        files.write_weights(temporary, "model", tensors(), shard_size=200)
        files.write_json(temporary / "mark.json", {"a": 1})


def pickled(place):
    pickle_writer.write(place, {"a": TENSORS["w1"], "step": 3})


def picture(place):
    made = np.zeros((32, 32, 3), np.uint8)
    records.save(place, made, records.of(TextToImage(prompt="a cat"), (32, 32)), beside=False)


def header(place):
    headers.tell(place, {"title": "x" * 100})


def caption(place):
    class_images._write(place, "a new caption")


WRITERS = {"a.safetensors": weights, "model": folder, "a.pt": pickled, "a.png": picture, "b.safetensors": header,
           "a.txt": caption}  # fmt: skip


def content(place):
    every = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return {path.name: path.read_bytes() for path in every}


@pytest.mark.parametrize("name", WRITERS)
def test_full_at_every_write(name, tmp_path, monkeypatch):
    place, write = tmp_path / name, WRITERS[name]
    if write is header:
        weights(place)
    elif write is folder:
        place.mkdir()
        (place / "mark.json").write_text("{}")
    else:
        place.write_bytes(b"somebody's work")
    before, count = content(place), 0
    while True:
        with full_after(count, monkeypatch) as left:
            try:
                write(place)
                assert left[0] >= 0
                break
            except ValueError as error:
                assert isinstance(error, room.NoRoom) and left[0] < 0
                assert str(error).startswith(f"{place}: cannot be written: No space left") and "\n" not in str(error)
        assert content(place) == before and [path.name for path in tmp_path.iterdir()] == [name]
        count += 1
    assert count >= 1 and content(place) != before


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "a.txt"])
def test_room_is_asked_for_before_anything_is_written(name, tmp_path, monkeypatch):
    place, write = tmp_path / name, WRITERS[name]
    if write is header:
        weights(place)
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch, full_after(10**6, monkeypatch) as left:
        patch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 9, 9))
        with pytest.raises(room.NoRoom) as error:
            write(place)
    assert str(error.value).startswith(f"{place}: ") and "MB to write, 0.00 MB free" in str(error.value)
    assert left[0] == 10**6 and sorted(tmp_path.iterdir()) == before and "\n" not in str(error.value)


def test_a_list_stops_in_the_middle_and_goes_on(tmp_path):
    """Two pictures are there, the disk is full at the third: 3, what is made stays; then the rest."""
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    jobs.write_text("".join(json.dumps({"prompt": f"a cat {i}", "seed": i}) + "\n" for i in range(4)))
    made = []

    class Quick(batch.Folder):
        def key(self, request):
            return request.name

        def write(self, request, key, image):
            if len(made) == 2:
                raise room.NoRoom(f"{self.path(request)}: cannot be written: No space left on device")
            made.append(request.name)
            super().write(request, key, image)

    class Drawn(maker.Maker):
        def make(self, requests, **more):
            return np.zeros((len(requests), 16, 16, 3), np.uint8)

        def expect(self, requests):
            pass

        def record(self, request, size, private=True, **more):
            return records.of(request.settings, size)

    with pytest.raises(room.NoRoom, match=r"000003.png: cannot be written: .*; 2 pictures made; start again"):
        batch.run(Quick(Drawn("adapters"), out), jobs, {"model": "random:tiny"}, batch=1)
    assert sorted(path.name for path in out.glob("*.png")) == ["000001.png", "000002.png"]
    assert not list(out.glob("*.lock")) and not list(out.glob(".*"))
    made[:] = [None] * 9
    assert batch.run(Quick(Drawn("adapters"), out), jobs, {"model": "random:tiny"}, batch=1) == (2, 0, 2)


def test_a_program_tells_where_a_list_ended(tmp_path, monkeypatch, capsys):
    """2: nothing began; 3: the disk is full."""
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "a"}\n')
    given = [str(jobs), "--out", str(tmp_path / "out"), "--model", "random:tiny"]
    assert batch.main("", [str(tmp_path / "none.jsonl"), *given[1:]]) == 2

    def stopped(*_, **__):
        raise room.NoRoom("x: cannot be written")

    monkeypatch.setattr(batch, "run", stopped)
    assert batch.main("", given) == 3
    assert "error: x: cannot be written" in capsys.readouterr().err
    with locks.held(tmp_path / "out", file="part-0-1.lock"):
        monkeypatch.undo()
        assert batch.main("", given) == 2


def test_a_checkpoint_that_has_no_room(tmp_path, monkeypatch):
    state = {"step": np.int32(1), "trained": {"w": np.zeros(3, np.float32)}}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, "base", wait=True)

    def none(path, size):
        raise room.NoRoom(f"{path}: 2.00 GB to write, 1.00 GB free")

    with monkeypatch.context() as patch:
        patch.setattr(files, "check_room", none)
        with pytest.raises(ValueError, match=r"checkpoints: no room .*; checkpoint 1 is whole, start again from it"):
            checkpoints.save({**state, "step": np.int32(2)}, "base", wait=True)
    checkpoints.save({**state, "step": np.int32(2)}, "base", wait=True)
    assert int(checkpoints.restore(state, "base")["step"]) == 2
    checkpoints.close()


def test_what_writing_raises_in_the_background(tmp_path, monkeypatch):
    state = {"step": np.int32(1), "trained": {"w": np.zeros(3, np.float32)}}
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def fails():
        raise ValueError("RESOURCE_EXHAUSTED: writing\nNo space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.manager, "wait_until_finished", fails)
        with pytest.raises(
            ValueError, match="checkpoints: no room on the disk for a checkpoint; no checkpoint is"
        ) as e:
            checkpoints.save(state, "base", wait=True)
    assert "\n" not in str(e.value)
    checkpoints.close()


def test_a_device_that_is_full_is_no_full_disk(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def fails():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.manager, "wait_until_finished", fails)
        with pytest.raises(ValueError, match="^fewer rows$"), room.memory("fewer rows"):
            checkpoints.wait()
    checkpoints.close()


def test_a_cache_that_is_full_keeps_its_records(tmp_path, monkeypatch):
    store, real = Store(tmp_path / "a.records"), os.write
    store.put(key(1), {"x": np.ones(3, np.float32)})

    def part(descriptor, data):
        real(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", part)
        with pytest.raises(ValueError, match="a.records: cannot be written: No space left"):
            store.put(key(2), {"x": np.ones(3, np.float32)})
    again = Store(tmp_path / "a.records")
    assert len(again) == 1 and again.get(key(1))["x"].sum() == 3
    store.put(key(2), {"x": np.ones(3, np.float32)})
    assert len(Store(tmp_path / "a.records")) == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "out: cannot be written: No space .*; all is well",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "out: cannot be written: Read-only file system; all is well"),
        (OSError(errno.EIO, "Input/output error"), "Errno 5. Input/output error"),
        (KeyError("a"), "'a'"),
    ],
)
def test_disk(error, line):
    with pytest.raises(Exception, match=line), room.disk("out", "all is well"):
        raise error


def test_memory():
    with pytest.raises(ValueError, match="^fewer$"), room.memory("fewer"):
        raise MemoryError
    with pytest.raises(KeyError), room.memory("fewer"):
        raise KeyError("a")


def test_names_of_temporary_files(tmp_path):
    """Links are not followed, other machines' files stay, and nothing blocks a save."""
    victim, name = tmp_path / "victim", "x" * 240 + ".json"
    victim.mkdir()
    (victim / "work").write_text("mine")
    place = tmp_path / "a.json"
    (tmp_path / ".a.json.saving-link").symlink_to(victim)
    (tmp_path / f".a.json.saving-{files._host()}-999999999-ab").symlink_to(victim)
    (tmp_path / ".a.json.saving-999999999").mkdir()
    (tmp_path / f".a.json.saving-{files._host()}-{os.getpid()}-cd").write_text("being written")
    (tmp_path / ".a.json.saving-elsewh-1-ef").write_text("another machine's")
    for path in (place, tmp_path / name):
        with files.new_file(path) as temporary:
            assert not temporary.exists()
            temporary.write_text("{}")
        assert path.read_text() == "{}"
    assert (victim / "work").read_text() == "mine"
    left = {path.name for path in tmp_path.iterdir()} - {"victim", "a.json", name}
    assert left == {f".a.json.saving-{files._host()}-{os.getpid()}-cd", ".a.json.saving-elsewh-1-ef"}


assert sdjax and Image and lists  # imported before `open` is replaced
