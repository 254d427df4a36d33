"""The queue: jobs in their order, each given to one process, and a file that is ours alone."""

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdjax.service.queue import BEHIND, CANCELLED, DONE, FAILED, RUNNING, STOPPED, TRIES, VERSION, WAITING, Queue


@pytest.fixture
def queue(tmp_path):
    return Queue(tmp_path / "queue.db")


def put(queue, count=1, kind="pictures"):
    return [queue.add(kind, {"task": "text2img", "settings": {}, "count": 1}, "test") for _ in range(count)]


def test_a_job_goes_from_waiting_to_done(queue):
    (job,) = put(queue)
    assert (job.state, job.kind, job.request["task"], job.source) == (WAITING, "pictures", "text2img", "test")
    taken = queue.take(os.getpid())
    assert taken.id == job.id and taken.state == RUNNING and taken.pid == os.getpid() and queue.take(1) is None
    queue.update(job.id, phase="sampling", step=3, steps=20)
    queue.show(job.id, b"png")
    assert queue.get(job.id).step == 3 and queue.preview(job.id) == b"png"
    queue.finish(job.id, DONE, {"pictures": ["a.png"]})
    done = queue.get(job.id)
    assert done.over and done.result == {"pictures": ["a.png"]} and done.pid is None and queue.preview(job.id) is None
    assert done.changed > job.changed and queue.get(99) is None


def test_each_job_is_given_once_to_many_who_ask(queue):
    wanted = {job.id for job in put(queue, 40)}

    def work(pid):
        own = Queue(queue.path)
        return [job.id for job in iter(lambda: own.take(pid), None)]

    with ThreadPoolExecutor(4) as threads:
        found = [id for some in threads.map(work, range(1, 5)) for id in some]
    assert sorted(found) == sorted(wanted)


def test_order_move_pause_clear(queue):
    a, b, c = put(queue, 3)
    queue.move(c.id, before=a.id)
    assert [job.id for job in queue.waiting()] == [c.id, a.id, b.id]
    queue.move(c.id)
    queue.move(b.id, before=a.id)
    queue.move(b.id, before=b.id)
    assert [job.id for job in queue.waiting()] == [b.id, a.id, c.id]
    with pytest.raises(ValueError, match="does not wait"):
        queue.move(a.id, before=77)
    queue.pause(True)
    assert queue.paused and queue.take(1) is None
    queue.pause(False)
    assert queue.take(1).id == b.id
    with pytest.raises(ValueError, match="does not wait"):
        queue.move(b.id)
    assert queue.clear() == 2 and {queue.get(one.id).state for one in (a, c)} == {CANCELLED}
    assert queue.get(b.id).state == RUNNING


def test_stop_skip_resume(queue):
    waits, runs = put(queue, 2)
    assert queue.ask(waits.id, "stop").state == CANCELLED and queue.take(1).id == runs.id
    assert queue.ask(runs.id, "skip").asked == "skip" and queue.ask(runs.id, "stop").asked == "stop"
    assert queue.ask(runs.id, "skip").asked == "stop" and queue.ask(99, "stop") is None
    queue.finish(runs.id, CANCELLED)
    again = queue.resume(waits.id)
    assert again.state == WAITING and queue.take(1).id == waits.id
    queue.finish(waits.id, DONE)
    assert queue.resume(waits.id).state == DONE
    assert queue.forget(waits.id) and not queue.forget(waits.id) and queue.get(waits.id) is None


def test_what_a_dead_worker_left_waits_again_in_its_place(queue):
    first, second = put(queue, 2)
    queue.take(1)
    assert [job.id for job in queue.left()] == [first.id]
    assert queue.take(1).id == first.id and queue.get(first.id).tries == 1
    queue.ask(first.id, "stop")
    queue.left()
    assert queue.get(first.id).state == CANCELLED
    run = put(queue, kind="training")[0]
    for _ in range(2):
        queue.take(1)
    queue.ask(run.id, "stop")
    queue.left()
    assert queue.get(run.id).state == STOPPED and queue.get(second.id).state == WAITING


def test_a_job_at_which_the_worker_always_dies_lets_others_go_first_and_fails(queue):
    (job,), (other,) = put(queue), put(queue)
    for _ in range(BEHIND):
        assert queue.take(1).id == job.id
        queue.left()
    assert queue.take(1).id == other.id
    queue.finish(other.id, DONE)
    for _ in range(BEHIND, TRIES):
        assert queue.take(1).id == job.id
        queue.left()
    assert queue.get(job.id).state == FAILED and "died" in queue.get(job.id).error


def test_changes_are_seen_once_and_in_order(queue):
    put(queue, 3)
    seen = queue.since(0)
    last = seen[-1].changed
    assert [job.id for job in seen] == [1, 2, 3] and last == queue.clock() and queue.since(last) == []
    queue.update(1, step=1)
    assert [job.id for job in queue.since(last)] == [1]
    assert [job.id for job in queue.newest(2)] == [3, 2] and [job.id for job in queue.newest(9, before=2)] == [1]
    assert [job.id for job in queue.newest(states=["running"])] == []


def test_options_stay(queue):
    queue.options(a=[1, "x"], b=None)
    assert Queue(queue.path).option("a") == [1, "x"] and queue.option("c", 5) == 5


def test_only_its_owner_reads_the_file(queue):
    put(queue)
    for path in queue.path.parent.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


# ---- a database with foreign content -------------------------------------------------------------


def foreign(path, *statements):
    with sqlite3.connect(path) as base:
        for statement in statements:
            base.execute(statement)
    base.close()


def test_a_file_that_is_no_database_is_refused_and_stays(tmp_path):
    path = tmp_path / "queue.db"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="no job database"):
        Queue(path)
    assert path.read_bytes() == b"no database" * 100


@pytest.mark.parametrize(
    "statement",
    [
        "create table jobs (id, name)",
        "create view jobs as select 1 as id",
        "create table other (x)",
        f"pragma user_version={VERSION + 1}",
    ],
)
def test_a_database_of_somebody_else_is_refused(tmp_path, statement):
    path = tmp_path / "queue.db"
    if statement.startswith("pragma"):
        Queue(path)
    foreign(path, statement)
    with pytest.raises(ValueError, match="not this version's job database"):
        Queue(path)


@pytest.mark.parametrize(
    "statement",
    [
        "create trigger t after insert on jobs begin update jobs set request='{}'; end",
        "create view v as select load_extension('x')",
        "drop table previews",
    ],
)
def test_what_was_added_to_ours_is_refused(tmp_path, statement):
    path = tmp_path / "queue.db"
    Queue(path)
    foreign(path, statement)
    with pytest.raises(ValueError, match="not this version's job database"):
        Queue(path)


@pytest.mark.parametrize("text", ["", "[]", "no json", "[" * 100_000, "1"])
def test_a_request_that_is_none_is_an_empty_one(queue, text):
    (job,) = put(queue)
    foreign(queue.path, f"update jobs set request='{text}', result='{{\"pictures\": 3}}'")
    found = queue.get(job.id)
    assert found.request == {} and found.pictures == [] and found.count == 1
