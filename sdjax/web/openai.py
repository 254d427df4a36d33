"""/v1, OpenAI's image API.  Source: OpenAI's API reference, Images."""

import base64
import re
import time
from io import BytesIO
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from sdjax.images import masks, writing
from sdjax.service import uploads
from sdjax.service.orders import MOST
from sdjax.service.queue import FAILED, Job
from sdjax.settings import SettingError
from sdjax.web.services import Services, asks, body

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
OURS = ("negative_prompt", "seed", "steps", "guidance", "sampler", "schedule", "strength")  # beyond OpenAI's own
NUMBERS = ("n", "seed", "steps", "guidance", "strength")
GIVEN = {"grammar": "a1111", "seed": -1}


def router(services: Services) -> APIRouter:
    """Returns the endpoints."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    async def draw(request: Request, task: str, given: dict[str, Any], more: dict[str, Any]) -> Any:
        try:
            values, count, kind = _asked(services, given)
            job = await services.put(task, values | more, count, "openai")
        except (SettingError, ValueError) as error:
            return _refused(services.said(error))
        job = await services.over(job.id, request)
        if job.state == FAILED:
            return _refused(job.error, 500, "server_error")
        return await run_in_threadpool(_answer, services, request, job, given, kind)

    names = {"prompt": {"type": "string"}, "model": {"type": "string"}, "n": {"type": "integer"}}
    names |= {"size": {"type": "string"}, "response_format": {"enum": ["url", "b64_json"]}}
    names |= {"output_format": {"enum": list(FORMATS)}}

    @routes.post("/images/generations", openapi_extra=asks(names | {name: {} for name in OURS}, ("prompt",)))
    async def generations(request: Request) -> Any:
        """Makes pictures from words; also understood: negative_prompt, seed, steps, guidance, sampler, schedule."""
        return await draw(request, "text2img", await body(request), {})

    @routes.post("/images/edits")
    async def edits(request: Request) -> Any:
        """Makes pictures from a picture; with a mask, whose clear part is painted, within it."""
        async with request.form(max_files=20, max_fields=40) as form:
            given = {name: value for name, value in form.multi_items() if isinstance(value, str)}
            files = {}
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if (value.size or 0) > uploads.MOST_BYTES:
                        return _refused(f"{name}: expected at most {uploads.MOST_BYTES >> 20} MB")
                    files.setdefault(name.removesuffix("[]"), await value.read())
        try:
            if "image" not in files:
                raise SettingError("image", None, "a picture's file")
            more: dict[str, Any] = {"image": await services.keep(files["image"])}
            if "mask" in files:
                more["mask"] = await services.keep(await run_in_threadpool(_hole, files["mask"]), "mask")
        except SettingError as error:
            return _refused(services.said(error))
        numbers = {name: _number(given[name]) for name in NUMBERS if name in given}
        return await draw(request, "inpaint" if "mask" in more else "img2img", given | numbers, more)

    @routes.get("/models")
    def models() -> dict[str, Any]:
        """The library's models."""
        there = services.library.entries("model")
        return {"object": "list", "data": [_model(one.name) for one in there]}

    @routes.get("/models/{name:path}")
    def model(name: str) -> Any:
        """One model."""
        try:
            return _model(services.library.find("model", name).name)
        except SettingError as error:
            return _refused(services.said(error), 404)

    @routes.get("/pictures/{id}/{number}")
    def picture(id: int, number: int) -> Response:
        """A picture that an answer gave the address of."""
        job = services.queue.get(id)
        names = job.pictures if job is not None and job.source == "openai" else []
        if not 0 <= number < len(names):
            raise HTTPException(404, "no such picture")
        return Response(services.place.picture(names[number]).read_bytes(), media_type="image/png")

    return routes


def _asked(services: Services, given: dict[str, Any]) -> tuple[dict[str, Any], int, str]:
    """Returns (settings, how many pictures, the format) of a body."""
    prompt, count = given.get("prompt"), given.get("n")
    if not isinstance(prompt, str):
        raise SettingError("prompt", prompt, "a text")
    count = 1 if count is None else count
    if type(count) is not int or not 1 <= count <= MOST:
        raise SettingError("n", count, f"a whole number, 1 to {MOST}")
    values = GIVEN | {name: given[name] for name in OURS if given.get(name) is not None}
    values["prompt"] = prompt
    size, model, kind = given.get("size"), given.get("model"), given.get("output_format") or "png"
    if size not in (None, "auto"):
        if not isinstance(size, str) or not re.fullmatch(r"\d{2,5}x\d{2,5}", size):
            raise SettingError("size", size, "WIDTHxHEIGHT")
        values["size"] = size
    if kind not in FORMATS:
        raise SettingError("output_format", kind, f"one of {', '.join(FORMATS)}")
    if model not in (None, ""):
        values["model"] = model
    return values, count, kind


def _answer(services: Services, request: Request, job: Job, given: dict[str, Any], kind: str) -> dict[str, Any]:
    data = []
    for number, picture in enumerate(services.pictures(job)):
        if given.get("response_format") == "url":
            data.append({"url": f"{request.base_url}v1/pictures/{job.id}/{number}"})
        else:
            data.append({"b64_json": base64.b64encode(_in_format(picture, kind)).decode()})
    return {"created": int(time.time()), "data": data, "output_format": kind}


def _in_format(data: bytes, kind: str) -> bytes:
    """Returns a PNG's picture in another format."""
    if kind == "png":
        return data
    Image.open(BytesIO(data), formats=("PNG",)).convert("RGB").save(written := BytesIO(), FORMATS[kind], quality=95)
    return written.getvalue()


def _hole(data: bytes) -> bytes:
    """Returns a mask that is white where one of OpenAI's is clear.  Raises SettingError for what is no picture."""
    uploads.check(data, "mask")
    picture = masks.opened(Image.open(BytesIO(data), formats=tuple(FORMATS.values())))
    if picture.mode != "RGBA":
        raise SettingError("mask", picture.mode, "a picture that is clear where to paint")
    return writing.png(Image.eval(picture.getchannel("A"), lambda alpha: 255 - alpha))


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sdjax"}


def _refused(text: str, status: int = 400, kind: str = "invalid_request_error") -> JSONResponse:
    return JSONResponse({"error": {"message": text, "type": kind, "param": None, "code": None}}, status)
