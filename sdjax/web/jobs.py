"""/api/jobs: submits jobs, follows them and returns their results.  Unknown keys are errors."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from sdjax.sampling.settings import TASKS
from sdjax.service import picture_sets, teaching, tools, uploads
from sdjax.service.queue import RUNNING, Job
from sdjax.settings import UNSAID, SettingError, nearest
from sdjax.web.services import Services, asks, body, schema

KEYS = ("task", "settings", "count")
BEAT = 15.0  # seconds after which a stream that has nothing to say sends a comment
LOOK = 0.1
MOST = 500  # jobs of one answer
ASKED = ("stop", "skip", "resume", "move", "sample", "save", "keep")


def shown(job: Job) -> dict[str, Any]:
    """Returns a job as clients see it, without keys of files and numbers of processes."""
    settings = job.request.get("settings")
    return {
        "id": job.id,
        "kind": job.kind,
        "task": next((job.request[name] for name in ("task", "recipe", "tool") if job.request.get(name)), None),
        "name": job.request.get("name", ""),
        "settings": settings if isinstance(settings, dict) else {},
        "count": job.count,
        "source": job.source,
        "state": job.state,
        "phase": job.phase,
        "step": job.step,
        "steps": job.steps,
        "made": job.made,
        "progress": 1.0 if job.state == "done" else progress(job),
        "asked": job.asked,
        "error": job.error,
        "pictures": len(job.pictures),
        "seeds": job.result.get("seeds", []),
        "result": {name: value for name, value in job.result.items() if name in ("export", "samples", "figures")},
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "changed": job.changed,
    }


def progress(job: Job) -> float:
    """Returns how much of a job is done, 0 to 1: its pictures, and the part of the next one."""
    part = job.step / job.steps if job.steps else 0.0
    if job.kind == "training":
        return min(1.0, part)
    count = job.count
    return min(1.0, (job.made + part * (job.made < count) * (job.state == RUNNING)) / count)


def router(services: Services) -> APIRouter:
    """Returns the endpoints."""
    routes = APIRouter(prefix="/api", tags=["jobs"])
    queue, place = services.queue, services.place

    def found(id: int) -> Job:
        job = queue.get(id)
        if job is None:
            raise HTTPException(404, f"job {id}: there is none")
        return job

    @routes.get("/settings")
    def settings() -> dict[str, Any]:
        """The settings of every task, as JSON schemas, and the recipes of training."""
        return {"tasks": {task: schema(task) for task in TASKS}, "recipes": list(teaching.recipes())}

    every: dict[str, Any] = {"task": {"enum": list(TASKS)}, "settings": {"oneOf": [schema(task) for task in TASKS]}}

    @routes.post(
        "/jobs", status_code=201, openapi_extra=asks({**every, "count": {"type": "integer"}}, ("task",), False)
    )
    async def put(request: Request) -> dict[str, Any]:
        """Puts pictures at the end of the queue."""
        given = await body(request)
        for name in given.keys() - set(KEYS):
            raise SettingError(name, UNSAID, nearest(name, KEYS), "unknown")
        values = given.get("settings", {})
        if not isinstance(values, dict):
            raise SettingError("settings", values, "an object")
        return shown(await services.put(given.get("task", "text2img"), values, given.get("count", 1), "api"))

    trains: dict[str, Any] = {name: {"type": "string"} for name in ("recipe", "model", "init", "name")}
    trains |= {"settings": {"type": "object"}, "data": {"type": "object"}}

    @routes.post("/training", status_code=201, openapi_extra=asks(trains, ("recipe",), False))
    async def train(request: Request) -> dict[str, Any]:
        """Puts a training run: {"recipe", "data", "model", "init", "settings", "name"}; see service/teaching.py."""
        order, steps = await run_in_threadpool(teaching.order_of, services.library, await body(request))
        return shown(queue.add("training", order, "api", steps))

    @routes.post("/tools", status_code=201, openapi_extra=asks({name: {} for name in tools.KEYS}, ("tool",), False))
    async def tool(request: Request) -> dict[str, Any]:
        """Puts a job that makes files of files: merge, resize, extract, convert; see service/tools.py."""
        order = await run_in_threadpool(tools.order_of, services.library, await body(request))
        return shown(queue.add("tool", order, "api"))

    @routes.get("/jobs")
    def listed(count: int = 100, before: int | None = None) -> dict[str, Any]:
        """The newest jobs, the queue in its order, and whether it is paused."""
        jobs = queue.newest(max(1, min(count, MOST)), before=before)
        order = [job.id for job in queue.waiting()]
        return {"jobs": [shown(job) for job in jobs], "order": order, "paused": queue.paused}

    @routes.get("/jobs/{id}")
    def one(id: int) -> dict[str, Any]:
        """One job."""
        return shown(found(id))

    @routes.delete("/jobs/{id}")
    def forget(id: int) -> dict[str, Any]:
        """Takes a job that is over off the list; its files stay."""
        if not found(id).over or not queue.forget(id):
            raise HTTPException(409, f"job {id}: is not over; stop it first")
        return {}

    @routes.post("/jobs/{id}/{what}")
    async def ask(id: int, what: str, request: Request) -> dict[str, Any]:
        """stop, skip (the next picture), resume, move ({"before": id}); of a run: sample, save, keep ({"name": text}).

        keep copies the adapter that a run left to those that prompts name.
        """
        job = found(id)
        if what not in ASKED:
            raise HTTPException(404, f"{what[:40]!r}: expected one of {', '.join(ASKED)}")
        if what in teaching.ORDERS:
            if job.kind != "training" or job.state != RUNNING:
                raise HTTPException(409, f"job {id}: is no training run that is under way")
            teaching.order(place.run(job.key), what)
        elif what == "keep":
            await run_in_threadpool(teaching.keep, place, job.key, (await body(request)).get("name", ""))
        elif what == "move":
            before = (await body(request)).get("before")
            if before is not None and type(before) is not int:
                raise SettingError("before", before, "a job's number")
            queue.move(id, before)
        elif what == "resume":
            queue.resume(id)
        else:
            queue.ask(id, what)
        return shown(found(id))

    @routes.post("/queue/{what}")
    def control(what: str) -> dict[str, Any]:
        """pause (what runs goes on), go, clear (what waits is cancelled)."""
        if what in ("pause", "go"):
            queue.pause(what == "pause")
        elif what == "clear":
            queue.clear()
        else:
            raise HTTPException(404, f"{what[:40]!r}: expected pause, go or clear")
        return {"paused": queue.paused}

    # ---- what a job made -------------------------------------------------------------------------

    @routes.get("/jobs/{id}/pictures/{number}")
    def picture(id: int, number: int) -> FileResponse:
        """A picture, a PNG with its settings in it."""
        names = found(id).pictures
        if not 0 <= number < len(names):
            raise HTTPException(404, f"job {id}: has {len(names)} pictures, numbered from 0")
        return FileResponse(place.picture(names[number]), media_type="image/png")

    @routes.get("/jobs/{id}/preview")
    def preview(id: int) -> Response:
        """What a running job's first picture looks like by now, a small PNG; 204 where there is nothing yet."""
        seen = queue.preview(found(id).id)
        return Response(seen, media_type="image/png") if seen else Response(status_code=204)

    @routes.get("/jobs/{id}/figures")
    def figures(id: int) -> list[dict[str, Any]]:
        """The lines of a run's metrics.jsonl."""
        return teaching.figures(place.run(found(id).key))

    @routes.get("/jobs/{id}/log")
    def log(id: int) -> PlainTextResponse:
        """The end of what a run printed."""
        return PlainTextResponse(teaching.tail(place.run(found(id).key) / "log.txt"))

    @routes.get("/jobs/{id}/samples")
    def samples(id: int) -> list[str]:
        """The names of a run's pictures."""
        return teaching.samples(place.run(found(id).key))

    @routes.get("/jobs/{id}/samples/{name}")
    def sample(id: int, name: str) -> FileResponse:
        """A picture of a run."""
        folder = place.run(found(id).key)
        if name not in teaching.samples(folder):
            raise HTTPException(404, "no such picture")
        return FileResponse(folder / "samples" / name, media_type="image/png")

    @routes.get("/jobs/{id}/export/{name:path}")
    def export(id: int, name: str) -> FileResponse:
        """A file that a run left."""
        folder = place.run(found(id).key)
        if name not in teaching.result(folder)["export"]:
            raise HTTPException(404, "no such file")
        path = folder / "export" / name
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    # ---- what jobs begin with ----------------------------------------------------------------------

    @routes.post("/uploads", status_code=201)
    async def upload(request: Request) -> dict[str, Any]:
        """Keeps a picture, the body's bytes or the form's file; returns the name that settings take."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            files = await _files(request, 1)
            if len(files) != 1:
                raise SettingError("files", len(files), "one picture")
            data = files[0][1]
        else:
            data = await request.body()
        return {"name": await services.keep(data)}

    @routes.get("/uploads/{name}")
    def uploaded(name: str) -> FileResponse:
        """An upload."""
        path = place.upload(name)
        if not path.is_file():
            raise HTTPException(404, "no such upload")
        return FileResponse(path, media_type=f"image/{path.suffix.lstrip('.').replace('jpg', 'jpeg')}")

    @routes.post("/sets", status_code=201)
    async def new_set(request: Request) -> dict[str, Any]:
        """Keeps pictures and captions to train on, of a form's files or zip archives; returns the set's key."""
        key = secrets.token_hex(16)
        count = await run_in_threadpool(uploads.keep_set, place, key, await _files(request, 2 * uploads.MOST_FILES))
        return {"set": key, "pictures": count}

    @routes.get("/sets")
    def sets() -> dict[str, Any]:
        """The folders of pictures that the server was given, and the sets that were uploaded, with their files."""
        folders = place.data.iterdir() if place.data is not None else ()
        there = sorted(path.name for path in folders if path.is_dir() and not path.name.startswith("."))
        own = {path.name: sorted(one.name for one in path.iterdir()) for path in (place.root / "sets").iterdir()}
        return {"folders": there, "sets": own, "drawn": ["pocketland"]}

    @routes.get("/sets/{key}/{name}")
    def of_set(key: str, name: str) -> FileResponse:
        """A picture of a set."""
        path = picture_sets.picture(place, key, name)
        return FileResponse(path, media_type=f"image/{path.suffix.lstrip('.').replace('jpg', 'jpeg')}")

    @routes.get("/events")
    async def events(request: Request, after: int | None = None) -> StreamingResponse:
        """A stream of jobs as they change (server-sent events); after: the number `changed` that was seen last."""
        last = request.headers.get("last-event-id", "")
        begin = int(last) if last.isdecimal() and len(last) < 19 else queue.clock() if after is None else after
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(services, request, begin), media_type="text/event-stream", headers=headers)

    return routes


async def _events(services: Services, request: Request, last: int) -> AsyncIterator[str]:
    """Yields a line for each change until the client goes away."""
    quiet, paused = 0.0, None
    yield ": sdjax\n\n"
    while not await request.is_disconnected():
        for job in services.queue.since(last):
            last, quiet = job.changed, 0.0
            yield f"id: {job.changed}\nevent: job\ndata: {json.dumps(shown(job))}\n\n"
        if paused != (paused := services.queue.paused):
            yield f"event: queue\ndata: {json.dumps({'paused': paused})}\n\n"
        quiet += LOOK
        if quiet >= BEAT:
            quiet = 0.0
            yield ": still here\n\n"
        await asyncio.sleep(LOOK)


async def _files(request: Request, most: int) -> list[tuple[str, bytes]]:
    """Returns (name, bytes) of a form's files."""
    async with request.form(max_files=most, max_fields=16) as form:
        given = [one for _, one in form.multi_items() if isinstance(one, UploadFile)]
        return [(one.filename or "", await one.read()) for one in given]
