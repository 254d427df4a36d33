"""A durable job queue in one SQLite file, filled by the server and processed by workers.

    queue = Queue(Path("outputs/ui/queue.db"))
    job = queue.add("pictures", {"task": "text2img", "settings": {"prompt": "a cat"}, "count": 1})
    queue.take(os.getpid())             # in a worker: takes the first waiting job

Every change is one transaction and gives the job the next number in `changed`, so a watcher asks for changes after the
last number it saw.  A connection lasts for one call.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

APPLICATION = 0x5D1A0B5  # SQLite's application_id: this file is ours
VERSION = 1
KINDS = ("pictures", "training", "tool")
WAITING, RUNNING, DONE, FAILED, CANCELLED, STOPPED = "waiting", "running", "done", "failed", "cancelled", "stopped"
HALF = "half"  # asks a job to stop and to keep its unfinished picture as its preview
STOPS = ("stop", HALF)  # requests that end a running job
HALF_DONE = 20  # kept previews of cancelled jobs
ENDED = (DONE, FAILED, CANCELLED, STOPPED)
BEHIND = 5  # after so many deaths of the worker at a job without progress, the job moves behind all others
TRIES = 10  # after so many such deaths, the job has failed
BUSY = 30  # seconds that a call waits for other processes' transactions
TABLES = """
create table jobs (
    id integer primary key autoincrement, key text not null unique, kind text not null, request text not null,
    source text not null, state text not null, position real not null, phase text not null default '',
    step integer not null default 0, steps integer not null default 0, made integer not null default 0,
    asked text not null default '', pid integer, tries integer not null default 0, result text not null default '{}',
    error text not null default '', created real not null, started real, ended real, changed integer not null);
create index jobs_changed on jobs (changed);
create index jobs_state on jobs (state, position);
create table previews (job integer primary key, picture blob not null);
create table options (name text primary key, value text not null);
"""


@dataclass(frozen=True)
class Job:
    """A row of the table.

    key: 32 random hex digits that name its files.  kind: one of KINDS.  request: the order.  source: the client.
    state: waiting, running, or one of ENDED; a stopped job can be resumed.
    position: jobs run in this order.  phase: of a running job ("loading", "compiling", "sampling" ...), with `step` of
    `steps` steps and `made` pictures.  asked: one of STOPS, or "skip", until the worker acts on it.
    pid: of the worker that has the job.  tries: how often a worker died at it.  created, started, ended: seconds since
    1970.
    """

    id: int
    key: str
    kind: str
    request: dict[str, Any]
    source: str
    state: str
    position: float
    phase: str
    step: int
    steps: int
    made: int
    asked: str
    pid: int | None
    tries: int
    result: dict[str, Any]
    error: str
    created: float
    started: float | None
    ended: float | None
    changed: int

    @property
    def pictures(self) -> list[str]:
        """The names of its finished pictures."""
        names = self.result.get("pictures", [])
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

    @property
    def count(self) -> int:
        """The number of pictures in its order."""
        count = self.request.get("count", 1)
        return count if type(count) is int and count > 0 else 1

    @property
    def over(self) -> bool:
        """Whether its state is final."""
        return self.state in ENDED


COLUMNS = [field.name for field in dataclasses.fields(Job)]


class Queue:
    """The jobs in one file; creates a missing file, readable by its owner only.

    Raises ValueError for another kind of file and for one of another version of sdjax.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        try:
            with self._open() as base:
                self._prepare(base)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path}: not a job database ({error}); move it away to start a new one") from None

    def _prepare(self, base: sqlite3.Connection) -> None:
        base.execute("pragma journal_mode=wal")  # readers never wait for the writer
        base.execute("begin immediate")
        (application,), (version,) = (
            base.execute(f"pragma {name}").fetchone() for name in ("application_id", "user_version")
        )
        if application == 0 and not base.execute("select count(*) from sqlite_master").fetchone()[0]:
            for statement in filter(str.strip, TABLES.split(";")):
                base.execute(statement)
            base.execute(f"pragma application_id={APPLICATION}")
            base.execute(f"pragma user_version={VERSION}")
        elif (application, version) != (APPLICATION, VERSION) or _schema(base) != _wanted():
            raise ValueError(f"{self.path}: not a job database of this version; move it away to start a new one")
        base.execute("commit")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY, isolation_level=None)) as base:
            base.row_factory = sqlite3.Row
            base.execute("pragma synchronous=normal")
            base.execute("pragma trusted_schema=off")
            yield base

    def _rows(self, text: str, *values: Any) -> list[sqlite3.Row]:
        with self._open() as base:
            return base.execute(text, values).fetchall()

    def _jobs(self, text: str, *values: Any) -> list[Job]:
        return [_job(row) for row in self._rows(text, *values)]

    # ---- clients -------------------------------------------------------------------------------

    def add(self, kind: str, request: dict[str, Any], source: str = "", steps: int = 0) -> Job:
        """Appends a job and returns it."""
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
        text = (
            "insert into jobs (key, kind, request, source, state, steps, created, position, changed) values"
            f" (?, ?, ?, ?, 'waiting', ?, ?, {END}, {NEXT}) returning *"
        )
        given = secrets.token_hex(16), kind, json.dumps(request), source, steps, time.time()
        return self._jobs(text, *given)[0]

    def get(self, id: int) -> Job | None:
        """Returns a job by its number, or None."""
        return next(iter(self._jobs("select * from jobs where id=?", id)), None)

    def of_key(self, key: str) -> Job | None:
        """Returns a job by its key, or None."""
        return next(iter(self._jobs("select * from jobs where key=?", key)), None)

    def current(self, kind: str) -> Job | None:
        """Returns the running job of a kind, else its first waiting one, or None."""
        return next((job for job in self.waiting() if job.kind == kind), None)

    def newest(self, count: int = 100, states: Iterable[str] = (), before: int | None = None) -> list[Job]:
        """Returns the newest jobs, newest first; states: only these; before: only smaller numbers."""
        states = list(states)
        where = [f"state in ({', '.join('?' * len(states))})"] if states else []
        where += ["id < ?"] if before is not None else []
        text = f"select * from jobs {'where ' + ' and '.join(where) if where else ''} order by id desc limit ?"
        return self._jobs(text, *states, *([before] if before is not None else []), count)

    def waiting(self) -> list[Job]:
        """Returns the running and waiting jobs in order."""
        return self._jobs("select * from jobs where state in ('running', 'waiting') order by state, position")

    def since(self, changed: int, count: int = 200) -> list[Job]:
        """Returns jobs whose `changed` is above a number, oldest change first."""
        return self._jobs("select * from jobs where changed > ? order by changed limit ?", changed, count)

    def clock(self) -> int:
        """Returns the highest `changed`, 0 without jobs."""
        return self._rows("select coalesce(max(changed), 0) from jobs")[0][0]

    def ask(self, id: int, what: str) -> Job | None:
        """Asks a running job for one of STOPS or "skip"; cancels a waiting one.  Returns the job, or None."""
        self._rows(
            f"update jobs set state='cancelled', ended=?, changed={NEXT} where id=? and state='waiting'",
            time.time(), id,
        )  # fmt: skip
        self._rows(
            f"update jobs set asked=?, changed={NEXT} where id=? and state='running' and asked not in {STOPS!r}",
            what,
            id,
        )
        return self.get(id)

    def resume(self, id: int) -> Job | None:
        """Appends a stopped, cancelled or failed job to the waiting ones."""
        self._rows(
            "update jobs set state='waiting', error='', asked='', phase='', ended=null, tries=0,"
            f" position=(select max(position) + 1 from jobs), changed={NEXT}"
            " where id=? and state in ('stopped', 'cancelled', 'failed')",
            id,
        )
        return self.get(id)

    def move(self, id: int, before: int | None = None) -> None:
        """Moves a waiting job before another, or to the end.  Raises ValueError if either does not wait."""
        with self._open() as base:
            base.execute("begin immediate")
            rows = base.execute("select id, position from jobs where state='waiting' order by position").fetchall()
            places = {row["id"]: row["position"] for row in rows}
            if id not in places or before is not None and before not in places:
                raise ValueError(f"job {id if id not in places else before}: not waiting")
            places.pop(id)
            end = base.execute("select max(position) from jobs").fetchone()[0]
            if before is None:
                position = end + 1
            elif before in places:
                under = [one for one in places.values() if one < places[before]]
                position = (max(under) + places[before]) / 2 if under else places[before] - 1
            else:
                return
            base.execute(f"update jobs set position=?, changed={NEXT} where id=?", (position, id))
            base.execute("commit")

    def clear(self) -> int:
        """Cancels all waiting jobs; returns their number."""
        text = f"update jobs set state='cancelled', ended=?, changed={NEXT} where state='waiting' returning id"
        return len(self._rows(text, time.time()))

    def forget(self, id: int) -> bool:
        """Removes an ended job; returns whether it existed."""
        self._rows("delete from previews where job=?", id)
        return bool(self._rows(f"delete from jobs where id=? and state in {ENDED!r} returning id", id))

    # ---- workers -------------------------------------------------------------------------------

    def head(self) -> Job | None:
        """Returns the first waiting job; None if there is none or the queue is paused."""
        if self.paused:
            return None
        return next(iter(self._jobs("select * from jobs where state='waiting' order by position limit 1")), None)

    def take(self, pid: int, id: int | None = None) -> Job | None:
        """Gives the first waiting job, or job `id`, to a process; None if there is none or the queue is paused."""
        job = self.head() if id is None else self.get(id)
        if job is None:
            return None
        text = f"update jobs set state='running', phase='starting', step=0, pid=?, started=?, changed={NEXT}"
        taken = self._jobs(f"{text} where id=? and state='waiting' returning *", pid, time.time(), job.id)
        return taken[0] if taken else None

    def update(self, id: int, **values: Any) -> None:
        """Sets columns of a job: phase, step, steps, made, tries."""
        self._set(id, values)

    def finish(self, id: int, state: str, result: dict[str, Any] | None = None, error: str = "") -> None:
        """Ends a running job in a state; keeps its preview if it was asked to stop with HALF."""
        job = self.get(id)
        if job is not None and job.asked != HALF:
            self._rows("delete from previews where job=?", id)
        more = {} if result is None else {"result": json.dumps(result)}
        ended = {"state": state, "error": error, "pid": None, "asked": "", "phase": "", "ended": time.time()}
        self._set(id, ended | more)
        kept = f"select id from jobs where state='cancelled' order by changed desc limit {HALF_DONE}"
        self._rows(f"delete from previews where job in (select id from jobs where state in {ENDED!r}) "
                   f"and job not in ({kept})")  # fmt: skip

    def back(self, id: int) -> None:
        """Makes a running job wait again in its place."""
        self._set(id, {"state": WAITING, "pid": None, "phase": ""})

    def left(self) -> list[Job]:
        """Ends or requeues the jobs of dead workers and returns them; only the live worker may call it.

        A job that was asked to stop is stopped.  The others wait again; after BEHIND deaths behind all others, so that
        a job that kills workers delays no other.  After TRIES deaths the job has failed.
        """
        left = self._jobs("select * from jobs where state='running'")
        for job in left:
            if job.asked in STOPS:
                self.finish(job.id, STOPPED if job.kind == "training" else CANCELLED, job.result)
            elif job.tries + 1 >= TRIES:
                self.finish(job.id, FAILED, job.result, f"the worker died {TRIES} times at this job")
            else:
                again = {"state": WAITING, "pid": None, "phase": "", "tries": job.tries + 1}
                behind = {"position": self._end()} if job.tries + 1 == BEHIND else {}
                self._set(job.id, again | behind)
        return left

    def _end(self) -> float:
        """Returns the position after all jobs."""
        return self._rows(f"select {END}")[0][0]

    def _set(self, id: int, values: dict[str, Any]) -> None:
        named = ", ".join(f"{name}=?" for name in values)
        self._rows(f"update jobs set {named}, changed={NEXT} where id=?", *values.values(), id)

    # ---- previews, options ----------------------------------------------------------------------

    def show(self, id: int, picture: bytes) -> None:
        """Keeps a job's preview, a PNG."""
        self._rows("insert or replace into previews values (?, ?)", id, picture)

    def preview(self, id: int) -> bytes | None:
        """Returns the preview of a running or cancelled job, a PNG, or None."""
        return next((row[0] for row in self._rows("select picture from previews where job=?", id)), None)

    @property
    def paused(self) -> bool:
        """Whether the queue is paused."""
        return bool(self.option("paused", False))

    def pause(self, paused: bool) -> None:
        """Pauses or resumes the queue; a running job continues."""
        self.options(paused=paused)

    def option(self, name: str, usual: Any = None) -> Any:
        """Returns an option's value, `usual` if it is not set."""
        return next((json.loads(row[0]) for row in self._rows("select value from options where name=?", name)), usual)

    def options(self, **values: Any) -> None:
        """Stores options, {name: plain value}."""
        for name, value in values.items():
            self._rows("insert or replace into options values (?, ?)", name, json.dumps(value))


NEXT = "(select coalesce(max(changed), 0) + 1 from jobs)"
END = "(select coalesce(max(position), 0) + 1 from jobs)"  # after all jobs


def _job(row: sqlite3.Row) -> Job:
    """Returns the Job of a row; a damaged request becomes {}, which fails when a worker takes it."""
    values = {name: row[name] for name in COLUMNS}
    return Job(**{**values, "request": _object(row["request"]), "result": _object(row["result"])})


def _object(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _schema(base: sqlite3.Connection) -> list[tuple[str, str]]:
    """Returns the names and SQL of a database's tables and indices."""
    text = "select name, sql from sqlite_master where sql is not null and name not like 'sqlite_%' order by name"
    return [(name, " ".join(sql.split())) for name, sql in base.execute(text)]


def _wanted() -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as base:
        base.executescript(TABLES)
        return _schema(base)
