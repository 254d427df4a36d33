"""/api/jobs: submits jobs, follows them and returns their results.  Unknown keys are errors."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from sdjax.sampling.settings import TASKS
from sdjax.service import teaching, tools
from sdjax.service.queue import RUNNING, Job
from sdjax.settings import UNSAID, SettingError, nearest
from sdjax.training.recipes import known
from sdjax.web.services import Services, asks, body, schema

KEYS = ("task", "settings", "count")
BEAT = 15.0  # seconds after which an idle stream sends a comment
LOOK = 0.1
MOST = 500  # most jobs in a response
ASKED = ("stop", "skip", "resume", "move", "sample", "save", "keep")


def shown(job: Job) -> dict[str, Any]:
    """Returns a job for clients, without file keys and process numbers."""
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
    """Returns the share of a job that is done, 0 to 1: finished pictures and part of the next."""
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
            raise HTTPException(404, f"job {id}: no such job")
        return job

    @routes.get("/settings")
    def settings() -> dict[str, Any]:
        """The settings of every task, as JSON schemas, and the recipes of training."""
        return {"tasks": {task: schema(task) for task in TASKS}, "recipes": list(known())}

    every: dict[str, Any] = {"task": {"enum": list(TASKS)}, "settings": {"oneOf": [schema(task) for task in TASKS]}}

    @routes.post(
        "/jobs", status_code=201, openapi_extra=asks({**every, "count": {"type": "integer"}}, ("task",), False)
    )
    async def put(request: Request) -> dict[str, Any]:
        """Appends a picture job to the queue."""
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
        """Appends a training run: {"recipe", "data", "model", "init", "settings", "name"}; see service/teaching.py."""
        order, steps = await run_in_threadpool(teaching.order_of, services.library, await body(request))
        return shown(queue.add("training", order, "api", steps))

    @routes.post("/tools", status_code=201, openapi_extra=asks({name: {} for name in tools.KEYS}, ("tool",), False))
    async def tool(request: Request) -> dict[str, Any]:
        """Appends a job on files: merge, resize, extract or convert; see service/tools.py."""
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
        """Removes an ended job from the list; its files stay."""
        if not found(id).over or not queue.forget(id):
            raise HTTPException(409, f"job {id}: not over; stop it first")
        return {}

    @routes.post("/jobs/{id}/{what}")
    async def ask(id: int, what: str, request: Request) -> dict[str, Any]:
        """stop, skip (a picture), resume, move ({"before": id}); for a run: sample, save, keep ({"name": text}).

        keep copies a run's adapter to the folder that prompts name.
        """
        job = found(id)
        if what not in ASKED:
            raise HTTPException(404, f"{what[:40]!r}: expected one of {', '.join(ASKED)}")
        if what in teaching.ORDERS:
            if job.kind != "training" or job.state != RUNNING:
                raise HTTPException(409, f"job {id}: not a running training run")
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
        """pause (the running job continues), go, or clear (cancels waiting jobs)."""
        if what in ("pause", "go"):
            queue.pause(what == "pause")
        elif what == "clear":
            queue.clear()
        else:
            raise HTTPException(404, f"{what[:40]!r}: expected pause, go or clear")
        return {"paused": queue.paused}

    # ---- results ---------------------------------------------------------------------------------

    @routes.get("/jobs/{id}/pictures/{number}")
    def picture(id: int, number: int) -> FileResponse:
        """A picture, a PNG with its settings in it."""
        names = found(id).pictures
        if not 0 <= number < len(names):
            raise HTTPException(404, f"job {id}: has {len(names)} pictures, numbered from 0")
        return FileResponse(place.picture(names[number]), media_type="image/png")

    @routes.get("/jobs/{id}/preview")
    def preview(id: int) -> Response:
        """A preview of a running job's first picture, a small PNG; 204 before there is one."""
        seen = queue.preview(found(id).id)
        return Response(seen, media_type="image/png") if seen else Response(status_code=204)

    @routes.get("/jobs/{id}/figures")
    def figures(id: int) -> list[dict[str, Any]]:
        """The lines of a run's metrics.jsonl."""
        return teaching.figures(place.run(found(id).key))

    @routes.get("/jobs/{id}/log")
    def log(id: int) -> PlainTextResponse:
        """The end of a run's output."""
        return PlainTextResponse(teaching.tail(place.run(found(id).key) / "log.txt"))

    @routes.get("/jobs/{id}/samples")
    def samples(id: int) -> list[str]:
        """The names of a run's preview pictures."""
        return teaching.samples(place.run(found(id).key))

    @routes.get("/jobs/{id}/samples/{name}")
    def sample(id: int, name: str) -> FileResponse:
        """A preview picture of a run."""
        folder = place.run(found(id).key)
        if name not in teaching.samples(folder):
            raise HTTPException(404, "no such picture")
        return FileResponse(folder / "samples" / name, media_type="image/png")

    @routes.get("/jobs/{id}/export/{name:path}")
    def export(id: int, name: str) -> FileResponse:
        """A file that a run exported."""
        folder = place.run(found(id).key)
        if name not in teaching.result(folder)["export"]:
            raise HTTPException(404, "no such file")
        path = folder / "export" / name
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    @routes.get("/events")
    async def events(request: Request, after: int | None = None) -> StreamingResponse:
        """A stream of changed jobs (server-sent events); after: the last `changed` number that the client saw."""
        last = request.headers.get("last-event-id", "")
        begin = int(last) if last.isdecimal() and len(last) < 19 else queue.clock() if after is None else after
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(services, request, begin), media_type="text/event-stream", headers=headers)

    return routes


async def _events(services: Services, request: Request, last: int) -> AsyncIterator[str]:
    """Yields a line for each change until the client disconnects."""
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
