"""/api/library: the library's entries with metadata and previews."""

import secrets
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from sdjax.service import descriptions, sharing
from sdjax.service.library import Entry, known
from sdjax.settings import UNSAID, SettingError, nearest
from sdjax.web.services import Services, asks, body

NAME = {"name": {"type": "string"}}
NOTES = NAME | {"notes": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}}
PACKAGE = NAME | {"licence": {"type": "string"}, "private": {"type": "boolean"}, "pictures": {"type": "array"}}


def router(services: Services) -> APIRouter:
    """Returns the endpoints."""
    routes, library = APIRouter(prefix="/api/library", tags=["library"]), services.library

    def found(kind: str, name: str) -> Entry:
        if kind not in known():
            raise HTTPException(404, f"{kind[:40]!r}: expected one of {', '.join(known())}")
        return library.find(kind, name)

    def shown(one: Entry) -> dict[str, Any]:
        told = library.known_of(one)
        seen = one.path is not None and descriptions.preview(one.path) is not None
        about = {"kind": one.kind, "name": one.name, "title": library.title(one), "preview": seen}
        return {**about, **library.notes(one), **told}

    async def named(kind: str, request: Request, *keys: str) -> tuple[Entry, dict[str, Any]]:
        """Returns (the entry that a body names, the body); other keys must be known."""
        given = await body(request)
        for name in given.keys() - {"name", *keys}:
            raise SettingError(name, UNSAID, nearest(name, ["name", *keys]), "unknown")
        if not isinstance(given.get("name"), str):
            raise SettingError("name", given.get("name"), "a name in the library")
        return found(kind, given["name"]), given

    @routes.get("")
    def listed(kind: str | None = None) -> list[dict[str, Any]]:
        """All entries, or those of one kind; with hashes and words once they are computed."""
        return [shown(one) for one in library.entries(*([kind] if kind else []))]

    @routes.get("/{kind}/preview")
    def preview(kind: str, name: str) -> FileResponse:
        """The preview picture beside a file."""
        one = found(kind, name)
        path = descriptions.preview(one.path) if one.path is not None else None
        if path is None:
            raise HTTPException(404, "no preview")
        return FileResponse(path, media_type=f"image/{path.suffix.lower().lstrip('.').replace('jpg', 'jpeg')}")

    @routes.post("/{kind}/notes", openapi_extra=asks(NOTES, ("name",), False))
    async def note(kind: str, request: Request) -> dict[str, Any]:
        """Stores the owner's notes and tags."""
        one, given = await named(kind, request, "notes", "tags")
        notes, tags = given.get("notes", ""), given.get("tags", [])
        if not isinstance(notes, str) or not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise SettingError("notes", notes, "a text, with a list of texts as tags")
        await run_in_threadpool(library.note, one, notes, tags)
        return shown(one)

    @routes.post("/{kind}/package", openapi_extra=asks(PACKAGE, ("name",), False))
    async def package(kind: str, request: Request) -> FileResponse:
        """A zip for sharing: the file, pictures of jobs with settings, a card; private data only on request."""
        one, given = await named(kind, request, "licence", "private", "pictures")
        return await packed(one, given.get("licence", ""), given.get("private", False), given.get("pictures", []))

    @routes.get("/{kind}/package")
    async def packaged(kind: str, name: str, licence: str = "", private: bool = False) -> FileResponse:
        """The same zip without pictures, for a link on the page."""
        return await packed(found(kind, name), licence, private, [])

    async def packed(one: Entry, licence: Any, private: Any, asked: Any) -> FileResponse:
        if not isinstance(licence, str) or not isinstance(private, bool) or not isinstance(asked, list):
            raise SettingError("licence", licence, "a text, with private: true or false, pictures: [[job, number]]")
        pictures = [_picture(services, pair) for pair in asked]
        path = services.place.root / "trash" / f"{secrets.token_hex(8)}.zip"
        about = await run_in_threadpool(library.described, one)
        recipe = await run_in_threadpool(_recipe, services, one)
        more = {"pictures": pictures, "licence": licence, "recipe": recipe, "private": private}
        await run_in_threadpool(sharing.package, one, about, path, **more)
        gone = BackgroundTask(path.unlink, missing_ok=True)
        return FileResponse(path, media_type="application/zip", filename=f"{one.stem}.zip", background=gone)

    @routes.post("/{kind}/delete", openapi_extra=asks({"name": {"type": "string"}}, ("name",), False))
    async def delete(kind: str, request: Request) -> dict[str, Any]:
        """Moves a file and the files beside it into the server's trash folder."""
        one, _ = await named(kind, request)
        return {"trash": await run_in_threadpool(sharing.discard, library, one)}

    return routes


def _picture(services: Services, pair: Any) -> Path:
    """Returns the path of a job's picture."""
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(one) is int for one in pair):
        raise SettingError("pictures", pair, "[job, number]")
    job = services.queue.get(pair[0])
    if job is None or not 0 <= pair[1] < len(job.pictures):
        raise SettingError("pictures", pair, "a picture of a job")
    return services.place.picture(job.pictures[pair[1]])


def _recipe(services: Services, entry: Entry) -> dict[str, Any]:
    """Returns the recipe and plain settings of the run that made an entry, {} for others."""
    if entry.path is None or entry.path.parent.parent != services.place.root / "runs":
        return {}
    job = services.queue.of_key(entry.path.parent.name)
    return {} if job is None else {"recipe": job.request.get("recipe"), **job.request.get("settings", {})}
