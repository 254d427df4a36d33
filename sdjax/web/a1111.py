"""/sdapi/v1, the API of Open WebUI, SillyTavern, SwarmUI, the Photoshop plugin and webuiapi.

Calls wait for their pictures; closing the connection cancels the job.  Source: AUTOMATIC1111's stable-diffusion-webui
1.10, modules/api (routes and models).
"""

import base64
import json
import time
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from sdjax import __version__
from sdjax.sampling.fields import fields
from sdjax.sampling.settings import TASKS
from sdjax.service import extras, records, styles, uploads
from sdjax.service.queue import CANCELLED, FAILED, HALF, STOPS, WAITING, Job
from sdjax.settings import SettingError
from sdjax.web.a1111_words import NO_NAME, Asked, of_body, spelled
from sdjax.web.jobs import progress
from sdjax.web.services import Services, asks, body

SOURCE = "sdapi"
PICTURE = {"type": "string", "description": "base64, raw or as a data URL"}
KEPT = ("sd_model_checkpoint", "sd_vae", "CLIP_stop_at_last_layers", "randn_source", "eta_noise_seed_delta")
USUAL = {  # options that clients read
    "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1, "randn_source": "GPU", "eta_noise_seed_delta": 0,
    "samples_format": "png", "samples_save": True, "show_progress_every_n_steps": 1, "enable_pnginfo": True,
    "sd_checkpoint_hash": "", "img2img_fix_steps": False, "s_churn": 0, "live_previews_enable": True,
}  # fmt: skip


def schema(task: str) -> dict[str, Any]:
    """Returns the JSON-schema properties of a body, from the declarations of settings."""
    known = {one.about.api: one for one in fields(TASKS[task]).values() if one.about.api and " " not in one.about.api}
    found: dict[str, Any] = {name: {"description": one.about.help} for name, one in known.items()}
    found |= {name: {"type": "integer"} for name in ("width", "height", "batch_size", "n_iter")}
    found |= {"override_settings": {"type": "object"}, "alwayson_scripts": {"type": "object"}}
    return found | {"infotext": {"type": "string"}, "send_images": {"type": "boolean"}}


def router(services: Services) -> APIRouter:
    """Returns the endpoints for making pictures, progress and options."""
    routes, queue, library = APIRouter(prefix="/sdapi/v1", tags=["A1111"]), services.queue, services.library

    async def keep(given: object, name: str) -> str:
        kept = await services.keep(uploads.decoded(given, name), name)
        return await run_in_threadpool(uploads.inverted, services.place, kept) if name == "inverted mask" else kept

    async def draw(kind: str, request: Request) -> Any:
        given = await body(request)
        try:
            asked = await of_body(kind, given, options(), keep, extras.names(library), styles.of(services.place))
            job = await services.put(asked.task, asked.values, asked.count, SOURCE)
        except (SettingError, ValueError) as error:
            raise HTTPException(422, services.said(error, spelled)) from None
        _kept_options(given)
        job = await services.over(job.id, request)
        if job.state == FAILED:
            raise HTTPException(500, job.error)
        return await run_in_threadpool(answer, services, job, asked, given)

    def _kept_options(given: dict[str, Any]) -> None:
        """Stores override_settings if a body sets override_settings_restore_afterwards to false."""
        over = given.get("override_settings")
        if isinstance(over, dict) and given.get("override_settings_restore_afterwards", True) is False:
            queue.options(**{f"a1111.{name}": over[name] for name in KEPT if name in over})

    @routes.post("/txt2img", openapi_extra=asks(schema("text2img")))
    async def txt2img(request: Request) -> Any:
        """Makes pictures from a prompt."""
        return await draw("txt2img", request)

    img2img_body = schema("inpaint") | {"init_images": {"type": "array", "items": PICTURE}, "mask": PICTURE}

    @routes.post("/img2img", openapi_extra=asks(img2img_body))
    async def img2img(request: Request) -> Any:
        """Makes pictures from a picture; with a mask, changes only the masked part."""
        return await draw("img2img", request)

    @routes.post("/extra-single-image", openapi_extra=asks({"image": PICTURE}))
    async def extra(request: Request) -> Any:
        """Enlarges a picture with Lanczos, nearest pixels or an upscaling model of the library."""
        given = await body(request)
        try:
            name = await keep(given.get("image"), "image")
            asked = extras.asked(library, given)
            if asked.model is not None:
                values = {"image": name, "model": asked.model, "prompt": "", "noise_level": 0}
                job = await services.over((await services.put("upscale", values, 1, SOURCE)).id, request)
                if job.state == FAILED:
                    raise HTTPException(500, job.error)
                data = next(iter(services.pictures(job)), b"")
            else:
                data = await run_in_threadpool(extras.enlarged, services.place.upload(name), asked)
        except (SettingError, ValueError) as error:
            raise HTTPException(422, services.said(error)) from None
        return {"html_info": "", "image": base64.b64encode(data).decode()}

    @routes.post("/png-info", openapi_extra=asks({"image": PICTURE}))
    async def png_info(request: Request) -> Any:
        """The settings in a picture's file."""
        given = await body(request)
        try:
            name = await keep(given.get("image"), "image")
        except SettingError as error:
            raise HTTPException(422, services.said(error)) from None
        try:
            record = await run_in_threadpool(records.read, services.place.upload(name))
        except ValueError:
            return {"info": "", "items": {}, "parameters": {}}
        text = records.text(record)
        return {"info": text, "items": {"parameters": text}, "parameters": _words(text)}

    # ---- progress ----------------------------------------------------------------------------------

    @routes.get("/progress")
    def far(skip_current_image: bool = False) -> dict[str, Any]:
        """The progress of the current picture; textinfo names its phase, such as compiling."""
        job = queue.current("pictures")
        if job is None:
            return {
                "progress": 0.0,
                "eta_relative": 0.0,
                "state": _state(None),
                "current_image": None,
                "textinfo": None,
            }
        done, left = progress(job), 0.0
        if job.started is not None and done > 0:
            left = max(0.0, time.time() - job.started) * (1 - done) / done  # clocks may be set back
        seen = None if skip_current_image else queue.preview(job.id)
        image = base64.b64encode(seen).decode() if seen else None
        idle = "compiling" if queue.option("warming") else "waiting"
        text = idle if job.state == WAITING else job.phase
        shown = max(done, 0.01)  # for clients, 0 without a job means ready
        return {
            "progress": shown, "eta_relative": left, "state": _state(job), "current_image": image, "textinfo": text,
        }  # fmt: skip

    def _ask(what: str) -> dict[str, Any]:
        job = queue.current("pictures")
        if job is not None and job.source == SOURCE:
            queue.ask(job.id, what)
        return {}

    @routes.post("/interrupt")
    def interrupt() -> dict[str, Any]:
        """Stops the running job between two steps; its client gets the unfinished picture."""
        return _ask(HALF)

    @routes.post("/skip")
    def skip() -> dict[str, Any]:
        """Skips the current picture."""
        return _ask("skip")

    # ---- options -------------------------------------------------------------------------------------

    def options() -> dict[str, Any]:
        """The options; the server's default model replaces one that is gone."""
        kept = {name: queue.option(f"a1111.{name}") for name in KEPT}
        kept = {name: value for name, value in kept.items() if value is not None}
        try:
            entry = library.find("model", kept.get("sd_model_checkpoint") or library.own.name)
        except SettingError:
            entry = library.own
        return {**USUAL, **kept, "sd_model_checkpoint": library.title(entry)}

    @routes.get("/options")
    def get_options() -> dict[str, Any]:
        """The options; sd_model_checkpoint is a title of /sd-models."""
        return options()

    @routes.post("/options", openapi_extra=asks({name: {} for name in KEPT}))
    async def set_options(request: Request) -> JSONResponse:
        """Sets some or all options; ignores unknown ones."""
        given = await body(request)
        given = {name: given[name] for name in KEPT if given.get(name) is not None}
        try:
            for name, kind in (("sd_model_checkpoint", "model"), ("sd_vae", "vae")):
                if given.get(name) not in NO_NAME:
                    if not isinstance(given[name], str):
                        raise SettingError(name, given[name], "a title")
                    given[name] = library.find(kind, given[name], name).name
            for name in ("CLIP_stop_at_last_layers", "eta_noise_seed_delta"):
                if name in given and not isinstance(given[name], int):
                    raise SettingError(name, given[name], "a whole number")
        except SettingError as error:
            raise HTTPException(422, services.said(error)) from None
        queue.options(**{f"a1111.{name}": value for name, value in given.items()})
        return JSONResponse(None)

    return routes


def _state(job: Job | None) -> dict[str, Any]:
    """Returns the `state` of progress; job_count is 0 without a job."""
    return {
        "skipped": bool(job and job.asked == "skip"),
        "interrupted": bool(job and job.asked in STOPS),
        "stopping_generation": bool(job and job.asked in STOPS),
        "job": "" if job is None else f"job {job.id}",
        "job_count": 0 if job is None else job.count,
        "job_no": 0 if job is None else job.made,
        "job_timestamp": "0",
        "sampling_step": 0 if job is None else job.step,
        "sampling_steps": 0 if job is None else job.steps,
    }


def answer(services: Services, job: Job, asked: Asked, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the response of txt2img and img2img: pictures in base64, the body, and `info` as JSON text."""
    pictures: list[bytes] = []
    if given.get("send_images", True) is not False:
        half = services.queue.preview(job.id) if job.state == CANCELLED else None
        pictures = [*services.pictures(job), *([half] if half else [])]
    echoed = {name: value for name, value in given.items() if name not in ("init_images", "mask", "alwayson_scripts")}
    return {
        "images": [base64.b64encode(data).decode() for data in pictures],
        "parameters": echoed,
        "info": json.dumps(_info(services, job, asked)),
    }


def _info(services: Services, job: Job, asked: Asked) -> dict[str, Any]:
    """Returns the `info` that A1111 gives with pictures."""
    names, texts = job.pictures, job.result.get("infotexts", [])
    seeds = job.result.get("seeds", [])
    made = records.read(services.place.picture(names[0])) if names else None
    values = {} if made is None else made.settings
    prompt, negative = values.get("prompt", ""), values.get("negative_prompt", "")
    size = values.get("size")
    sampler = fields(TASKS[asked.task])["sampler"].choices or {}
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * len(names),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(names),
        "seed": seeds[0][0] if seeds else -1,
        "all_seeds": [seed for seed, _ in seeds],
        "subseed": (seeds[0][1] or 0) if seeds else -1,
        "all_subseeds": [other or 0 for _, other in seeds],
        "subseed_strength": values.get("variation", 0.0),
        "width": size.width if size else 0,
        "height": size.height if size else 0,
        "sampler_name": sampler.get(values.get("sampler", ""), values.get("sampler", "")),
        "cfg_scale": values.get("guidance"),
        "steps": values.get("steps"),
        "batch_size": len(names),
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": values.get("model", ""),
        "sd_model_hash": made.hashes.get("model", "") if made else "",
        "sd_vae_name": values.get("vae"),
        "sd_vae_hash": made.hashes.get("vae") if made else None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": values.get("strength", values.get("hires_strength")),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": asked.styles,
        "job_timestamp": "0",
        "clip_skip": values.get("clip_skip", 1),
        "is_using_inpainting_conditioning": False,
        "version": f"sdjax {__version__}",
        "notes": asked.notes,
    }


def _words(text: str) -> dict[str, Any]:
    """Returns {key: text} of a record's last line, and the prompts, as A1111's reader does."""
    try:
        record = records.parse(text)
    except ValueError:
        return {}
    known = fields(TASKS[record.task])
    found: dict[str, Any] = {"Prompt": record["prompt"], "Negative prompt": record["negative_prompt"]}
    for name, value in record.settings.items():
        if known[name].about.word and value not in (None, (), ""):
            choices = known[name].choices or {}
            found[known[name].about.word] = str(choices.get(value, value))
    return found
