"""/api/library: what requests may name, with what is known of it, and previews."""

from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

from sdjax.service import descriptions
from sdjax.service.library import KINDS, Entry
from sdjax.web.services import Services


def router(services: Services) -> APIRouter:
    """Returns the endpoints."""
    routes, library = APIRouter(prefix="/api/library", tags=["library"]), services.library

    def found(kind: str, name: str) -> Entry:
        if kind not in KINDS:
            raise HTTPException(404, f"{kind[:40]!r}: expected one of {', '.join(KINDS)}")
        return library.find(kind, name)

    def shown(one: Entry) -> dict[str, Any]:
        known = library.known_of(one)
        seen = one.path is not None and descriptions.preview(one.path) is not None
        return {"kind": one.kind, "name": one.name, "title": library.title(one), "preview": seen, **known}

    @routes.get("")
    def listed(kind: str | None = None) -> list[dict[str, Any]]:
        """All that there is, or one kind of it; hashes and words where they were read already."""
        return [shown(one) for one in library.entries(*([kind] if kind else []))]

    @routes.get("/{kind}/preview")
    def preview(kind: str, name: str) -> FileResponse:
        """The picture beside a file."""
        one = found(kind, name)
        path = descriptions.preview(one.path) if one.path is not None else None
        if path is None:
            raise HTTPException(404, "no preview")
        return FileResponse(path, media_type=f"image/{path.suffix.lower().lstrip('.').replace('jpg', 'jpeg')}")

    return routes
