"""A clock that is set back: nothing is lost, nothing is thought older than it is, and nothing waits for it."""

import os
import time

import numpy as np
import pytest
from PIL import Image

from sdjax.data.store import Store, key
from sdjax.formats.storage import files, hashes
from sdjax.runtime import locks
from sdjax.service import uploads
from sdjax.service.place import Place
from sdjax.service.queue import CANCELLED, DONE, HALF, HALF_DONE, RUNNING, Job, Queue
from sdjax.training.checkpoint import Checkpoints
from sdjax.web.server import create_app
from tests.serving import ask


@pytest.fixture
def back(monkeypatch):
    """Each look at the clock says an hour less than the one before."""
    now = [2_000_000_000.0]

    def earlier():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(time, "time_ns", lambda: int(earlier() * 1e9))
    return earlier


def old(path, days=400):
    os.utime(path, (time.time() - 86400 * days,) * 2)


def test_the_queue_keeps_its_order_and_what_ended_last(back, tmp_path):
    queue = Queue(tmp_path / "queue.db")
    jobs = [queue.add("pictures", {}) for _ in range(HALF_DONE + 2)]
    assert [job.created for job in jobs] == sorted((job.created for job in jobs), reverse=True)
    assert [job.id for job in queue.waiting()] == [job.id for job in jobs]
    assert [job.id for job in queue.newest()] == [job.id for job in reversed(jobs)]
    for job in jobs:
        assert queue.take(1).id == job.id and queue.get(job.id).state == RUNNING
        queue.show(job.id, b"png")
        queue.ask(job.id, HALF)
        queue.finish(job.id, CANCELLED)
        assert queue.preview(job.id) == b"png", "what ended last, whatever the clock says, keeps its picture"
    assert [queue.preview(job.id) for job in jobs[:2]] == [None, None]
    assert [job.id for job in queue.since(0)] == [job.id for job in jobs]
    again = queue.resume(jobs[0].id)
    queue.take(1)
    queue.finish(again.id, DONE)
    assert queue.since(queue.clock() - 1)[0].id == again.id


def test_how_long_a_job_takes_is_never_less_than_nothing(back):
    words = pytest.importorskip("sdjax.web.page.words")
    job = Job(
        id=1, key="", kind="training", request={}, source="", state=RUNNING, phase="training", step=5, steps=10, made=0,
        created=time.time() + 1e6, started=time.time() + 1e6, ended=None, position=1.0, changed=1, pid=1, asked="",
        tries=0, result={}, error="",
    )  # fmt: skip
    assert words.left(job) == "about 1 s left" and words.ago(time.time() + 1e6) == "just now"


def test_how_long_a_picture_takes_is_never_less_than_nothing(back, tmp_path):
    place = Place(tmp_path / "ui", "random:tiny").made()
    queue = Queue(place.queue)
    queue.take(1, queue.add("pictures", {"task": "text2img", "settings": {}}, steps=10).id)
    queue.update(1, step=5, steps=10, phase="sampling")
    said = ask(create_app(place), "GET", "/sdapi/v1/progress?skip_current_image=true").json()
    assert said["progress"] == 0.5 and said["eta_relative"] == 0


def test_an_upload_is_the_newest_when_it_comes(back, tmp_path):
    """Of too many the oldest go: not the one that was just sent, for which no job waits yet."""
    place, names = Place(tmp_path / "ui").made(), []
    for i in range(5):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "a.png")
        names.append(uploads.keep(place, (tmp_path / "a.png").read_bytes()))
        assert uploads.pruned(place, [], most=3) == (i > 2) and place.upload(names[-1]).is_file()
        old(place.upload(names[-1]), -40 + i)  # it came before the clock was set back
    assert uploads.keep(place, place.upload(names[1]).read_bytes()) == names[1]
    uploads.pruned(place, [], most=1)
    assert [path.name for path in (place.root / "uploads").iterdir()] == [names[1]]


@pytest.mark.parametrize("days", [400, -400])
def test_a_lock_and_a_temporary_file_have_no_age(days, tmp_path):
    """Who holds them is told by the process and its lock, however old or young they look."""
    with locks.held(tmp_path):
        old(tmp_path / locks.FILE, days)
        with pytest.raises(ValueError, match="wait for its end"), locks.held(tmp_path):
            pass
    (tmp_path / locks.FILE).write_text("")
    old(tmp_path / locks.FILE, days)
    with locks.held(tmp_path):
        pass
    place = tmp_path / "a.json"
    own, dead = (tmp_path / f".a.json.saving-{files._host()}-{pid}-ab" for pid in (os.getpid(), 999999999))
    for path in (own, dead):
        path.write_text("x")
        old(path, days)
    with files.new_file(place) as temporary:
        temporary.write_text("{}")
    assert own.exists() and not dead.exists() and place.read_text() == "{}"


def test_the_newest_checkpoint_is_that_of_the_highest_step(back, tmp_path):
    state = {"step": np.int32(0), "trained": {"w": np.zeros(3, np.float32)}}
    for step in (1, 2, 3):  # a start each
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
        found = checkpoints.restore(state, "base")
        assert step == 1 or int(found["step"]) == step - 1
        checkpoints.save({**state, "step": np.int32(step)}, "base", wait=True)
        checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "3"]


def test_files_that_became_older_are_read_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_HASHES", str(tmp_path / "hashes.json"))
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"a" * 100)
    first = hashes.sha256(path)
    path.write_bytes(b"b" * 100)
    old(path)
    assert hashes.sha256(path) != first
    store = Store(tmp_path / "a.records")
    store.put(key(1), {"x": np.ones(3, np.float32)})
    old(tmp_path / "a.records")
    store.put(key(2), {"x": np.ones(3, np.float32)})
    assert len(Store(tmp_path / "a.records")) == 2
