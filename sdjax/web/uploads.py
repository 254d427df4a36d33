"""/api/uploads and /api/sets: stores pictures and sets of training pictures, and returns them."""

import secrets
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from sdjax.service import picture_sets, uploads
from sdjax.settings import SettingError
from sdjax.web.services import Services


def router(services: Services) -> APIRouter:
    """Returns the endpoints."""
    routes = APIRouter(prefix="/api", tags=["uploads"])
    place = services.place

    @routes.post("/uploads", status_code=201)
    async def upload(request: Request) -> dict[str, Any]:
        """Stores a picture, the body's bytes or a form's file; returns its name for settings."""
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
        """An uploaded picture."""
        path = place.upload(name)
        if not path.is_file():
            raise HTTPException(404, "no such upload")
        return _shown(path)

    @routes.post("/sets", status_code=201)
    async def new_set(request: Request) -> dict[str, Any]:
        """Stores training pictures and captions from a form's files or zip archives; returns the set's key."""
        key = secrets.token_hex(16)
        count = await run_in_threadpool(uploads.keep_set, place, key, await _files(request, 2 * uploads.MOST_FILES))
        return {"set": key, "pictures": count}

    @routes.get("/sets")
    def sets() -> dict[str, Any]:
        """The folders of training pictures on the server, and the uploaded sets with their files."""
        folders = place.data.iterdir() if place.data is not None else ()
        there = sorted(path.name for path in folders if path.is_dir() and not path.name.startswith("."))
        own = {path.name: sorted(one.name for one in path.iterdir()) for path in (place.root / "sets").iterdir()}
        return {"folders": there, "sets": own, "drawn": ["pocketland"]}

    @routes.get("/sets/{key}/{name}")
    def of_set(key: str, name: str) -> FileResponse:
        """A picture of a set."""
        path = picture_sets.picture(place, key, name)
        return _shown(path)

    return routes


async def _files(request: Request, most: int) -> list[tuple[str, bytes]]:
    """Returns (name, bytes) of the files in a form."""
    async with request.form(max_files=most, max_fields=16) as form:
        given = [one for _, one in form.multi_items() if isinstance(one, UploadFile)]
        return [(one.filename or "", await one.read()) for one in given]


def _shown(path: Path) -> FileResponse:
    """Returns a picture's file as a response."""
    return FileResponse(path, media_type=f"image/{path.suffix.lstrip('.').replace('jpg', 'jpeg')}")
