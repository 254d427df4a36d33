"""Shared by the endpoints: queue and library, submitting and awaiting jobs, error messages."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool

from sdjax.sampling.fields import Field, Size, fields
from sdjax.sampling.settings import TASKS
from sdjax.service import orders, uploads
from sdjax.service.library import Library
from sdjax.service.place import Place
from sdjax.service.queue import Job, Queue
from sdjax.settings import SettingError

LOOK = 0.05  # seconds between checks of an awaited job
GONE = 499  # nginx's status for a client that disconnected


@dataclass(frozen=True)
class Services:
    """A server's place, queue and library."""

    place: Place
    queue: Queue
    library: Library

    async def put(self, task: str, values: Mapping[str, Any], count: int, source: str) -> Job:
        """Appends a picture job and returns it; raises SettingError for invalid settings."""
        order = await run_in_threadpool(orders.pictures, self.library, task, values, count)
        return self.queue.add("pictures", order, source)

    async def keep(self, data: bytes, setting: str = "image") -> str:
        """Stores an upload and returns its name; raises SettingError for data that is not a picture."""
        return await run_in_threadpool(self.kept, data, setting)

    def kept(self, data: bytes, setting: str = "image") -> str:
        """Does the work of `keep`, in a thread."""
        name = uploads.keep(self.place, data, setting)
        uploads.pruned(self.place, (json.dumps(job.request) for job in self.queue.waiting()))
        return name

    async def over(self, id: int, request: Request) -> Job:
        """Returns a job when it is over; asks it to stop if the client disconnects before."""
        looks = 0
        try:
            while True:
                job = self.queue.get(id)
                if job is None:
                    raise HTTPException(410, f"job {id} was removed")
                if job.over:
                    return job
                looks += 1
                if looks % 5 == 0 and await request.is_disconnected():
                    raise HTTPException(GONE, "the client disconnected")
                await asyncio.sleep(LOOK)
        except (HTTPException, asyncio.CancelledError):
            self.queue.ask(id, "stop")
            raise

    def said(self, error: Exception, spell: Callable[[str], str] = str) -> str:
        """Returns an error in one line without the server's paths; spell: setting -> its name for the client."""
        text = error.line(spell) if isinstance(error, SettingError) else str(error)
        return self.place.hidden(next(iter(text.splitlines()), type(error).__name__))

    def pictures(self, job: Job) -> list[bytes]:
        """Returns the bytes of a job's pictures, in order."""
        return [self.place.picture(name).read_bytes() for name in job.pictures]


async def body(request: Request) -> dict[str, Any]:
    """Returns the JSON object in a request; raises HTTPException for anything else."""
    text = await request.body()
    try:
        found = json.loads(text or b"{}")
    except (ValueError, RecursionError):  # for invalid or too deeply nested JSON
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(found, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return found


# ---- schemas, from the settings' declarations --------------------------------------------------------


def schema(task: str) -> dict[str, Any]:
    """Returns the JSON schema of a task's settings in requests."""
    known = {name: one for name, one in fields(TASKS[task]).items() if name in orders.NAMED or not one.about.mine}
    asked = [name for name in TASKS[task].asked if name in known]
    properties = {name: _property(one) for name, one in known.items()}
    return {"type": "object", "properties": properties, "required": asked, "additionalProperties": False}


def _property(one: Field) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if one.choices is not None:
        made = {"type": "string", "enum": list(one.choices)}
    elif one.kind is bool:
        made = {"type": "boolean"}
    elif one.kind in (int, float):
        ends = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum"}
        made = {"type": "integer" if one.kind is int else "number"}
        for end, word in ends.items():
            value = getattr(one.span, end, None)
            made |= {word: value} if value is not None and abs(value) < 1e30 else {}
    else:
        made = {"type": "string"}
    made = {"type": "array", "items": made} if one.several else made
    usual = str(one.usual) if isinstance(one.usual, Size) else one.usual
    said = "the library's name; " if one.name in orders.NAMED else "the name of an upload; " if one.about.file else ""
    return {**made, "description": said + one.about.help, **({} if usual in (None, ()) else {"default": usual})}


def asks(properties: dict[str, Any], required: tuple[str, ...] = (), more: bool = True) -> dict[str, Any]:
    """Returns the OpenAPI description of an endpoint that takes a JSON object; more: ignores other keys."""
    found = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": more}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": found}}}}
