"""/sdapi/v1 and /controlnet: the lists of names that A1111's clients request first."""

import base64
import dataclasses
import os
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from sdjax import __version__, conditions
from sdjax.conditions.canny import Canny
from sdjax.conditions.condition import Condition
from sdjax.diffusion import samplers
from sdjax.images import reading, writing
from sdjax.sampling.choices import SAMPLERS, SCHEDULES
from sdjax.sampling.fields import fields
from sdjax.sampling.hires_settings import Hires
from sdjax.service import extras, styles, uploads
from sdjax.service.library import Entry
from sdjax.settings import SettingError
from sdjax.web.a1111_words import MOST_UNITS, preprocessor
from sdjax.web.services import Services, asks, body

IMAGES = "controlnet_input_images"
DETECT = {
    "controlnet_module": {"type": "string", "description": "one of module_list"},
    IMAGES: {"type": "array", "items": {"type": "string", "description": "base64"}},
    "controlnet_threshold_a": {"type": "number"},
    "controlnet_threshold_b": {"type": "number"},
}
UNIT_ARGUMENTS = ("enabled", "module", "model", "weight", "image", "resize_mode", "guidance_start", "guidance_end")


def router(services: Services) -> APIRouter:
    """Returns the list endpoints under /sdapi/v1."""
    routes, library = APIRouter(prefix="/sdapi/v1", tags=["A1111"]), services.library

    @routes.get("/samplers")
    def of_samplers() -> list[dict[str, Any]]:
        """Samplers, with sdjax's names as aliases, and names that end in a schedule."""
        return [
            {"name": label, "aliases": [name, f"k_{name}"], "options": _options(name)}
            for name, label in SAMPLERS.items()
        ]

    @routes.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        """Noise schedules."""
        return [
            {"name": name, "label": label, "aliases": [name], "default_rho": -1.0, "need_inner_model": False}
            for name, label in SCHEDULES.items()
        ]

    @routes.get("/sd-models")
    def models() -> list[dict[str, Any]]:
        """Models; options.sd_model_checkpoint takes a `title`."""
        return [
            {
                "title": library.title(one),
                "model_name": one.stem,
                "hash": library.hash(one) or None,
                "sha256": library.known_of(one).get("hashes", {}).get("sha256"),
                "filename": one.name,
                "config": None,
            }
            for one in library.entries("model")
        ]

    @routes.get("/sd-vae")
    def vaes() -> list[dict[str, Any]]:
        """Autoencoders that can replace a model's."""
        return [{"model_name": one.name, "filename": one.name} for one in library.entries("vae")]

    @routes.get("/upscalers")
    def upscalers() -> list[dict[str, Any]]:
        """Ways to enlarge a picture."""
        return [_upscaler(name) for name in extras.names(library)]

    @routes.get("/latent-upscale-modes")
    def modes() -> list[dict[str, Any]]:
        """Ways to enlarge latents, for hires fix."""
        choices = fields(Hires)["hires_method"].choices or {}
        return [{"name": label} for name, label in choices.items() if name.startswith("latent")]

    @routes.get("/loras")
    def loras() -> list[dict[str, Any]]:
        """LoRA, named in prompts as <lora:NAME:1>."""
        return [_lora(one, library.known_of(one)) for one in library.entries("lora")]

    @routes.get("/embeddings")
    def embeddings() -> dict[str, Any]:
        """Embeddings; prompts contain their names."""
        found = {one.name: {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 0, "vectors": 0}
                 for one in library.entries("embedding")}  # fmt: skip
        return {"loaded": found, "skipped": {}}

    @routes.get("/hypernetworks")
    def hypernetworks() -> list[dict[str, Any]]:
        """Hypernetworks, named in prompts as <hypernet:NAME:1>."""
        return [{"name": one.name, "path": one.name} for one in library.entries("hypernet")]

    @routes.get("/face-restorers")
    @routes.get("/realesrgan-models")
    def none() -> list[Any]:
        """Empty: sdjax has none."""
        return []

    @routes.get("/prompt-styles")
    def prompt_styles() -> list[dict[str, str]]:
        """Prompt styles, from styles.csv in the server's folder."""
        try:
            return [dataclasses.asdict(one) for one in styles.of(services.place).values()]
        except ValueError as error:
            raise HTTPException(422, services.said(error)) from None

    @routes.get("/scripts")
    def scripts() -> dict[str, Any]:
        """Names for alwayson_scripts."""
        return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}

    @routes.get("/script-info")
    def script_info() -> list[dict[str, Any]]:
        """Arguments of alwayson_scripts."""
        arguments = [{"label": name, "value": None, "minimum": None, "maximum": None} for name in UNIT_ARGUMENTS]
        return [
            {"name": "controlnet", "is_alwayson": True, "is_img2img": both, "args": arguments} for both in (False, True)
        ]

    @routes.get("/memory")
    def memory() -> dict[str, Any]:
        """The machine's memory in bytes."""
        total, free = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        return {"ram": {"free": free, "used": total - free, "total": total}, "cuda": {"error": "unknown"}}

    @routes.get("/cmd-flags")
    def flags() -> dict[str, Any]:
        """The server's flags, without paths."""
        return {"api": True, "nowebui": False, "listen": False, "sdjax": __version__}

    async def refresh() -> JSONResponse:
        """Does nothing: every list reads the folders again."""
        await run_in_threadpool(library.entries)
        return JSONResponse(None)

    for name in ("checkpoints", "loras", "vae", "embeddings"):
        routes.add_api_route(f"/refresh-{name}", refresh, methods=["POST"])
    return routes


def controlnet(services: Services) -> APIRouter:
    """Returns the endpoints under /controlnet, as in A1111's extension."""
    routes, library = APIRouter(prefix="/controlnet", tags=["A1111"]), services.library

    @routes.get("/version")
    def version() -> dict[str, int]:
        """The version of the extension's API that sdjax follows."""
        return {"version": 2}

    @routes.get("/model_list")
    def models(update: bool = True) -> dict[str, Any]:
        """ControlNets."""
        return {"model_list": [library.title(one) for one in library.entries("controlnet")]}

    @routes.get("/module_list")
    def modules(alias_names: bool = False) -> dict[str, Any]:
        """Preprocessors: "none", and the conditions that sdjax computes."""
        detail = {name: {"model_free": False, "sliders": sliders(name)} for name in ("none", *modules_of())}
        return {"module_list": list(detail), "module_detail": detail}

    @routes.get("/control_types")
    def types() -> dict[str, Any]:
        """Preprocessors and models by type; sdjax has one type, All."""
        names = ["None", *(library.title(one) for one in library.entries("controlnet"))]
        every = {
            "module_list": ["none", *modules_of()],
            "model_list": names,
            "default_option": "none",
            "default_model": names[-1],
        }
        return {"control_types": {"All": every}}

    @routes.post("/detect", openapi_extra=asks(DETECT))
    async def detect(request: Request) -> dict[str, Any]:
        """Computes a preprocessor's conditions of pictures."""
        given = await body(request)
        pictures = given.get(IMAGES)
        try:
            if not isinstance(pictures, list) or not pictures:
                raise SettingError(IMAGES, pictures, "a list of pictures in base64")
            unit = {name.removeprefix("controlnet_"): value for name, value in given.items()}
            maker = preprocessor(unit)
            names = [await services.keep(uploads.decoded(one, IMAGES), IMAGES) for one in pictures]
            made = [await run_in_threadpool(_made, maker, services.place.upload(name)) for name in names]
        except ValueError as error:
            raise HTTPException(422, services.said(error)) from None
        return {"images": [base64.b64encode(one).decode() for one in made], "info": "Success"}

    @routes.get("/settings")
    def settings() -> dict[str, Any]:
        """The most ControlNets of one picture."""
        return {"control_net_unit_count": MOST_UNITS}

    return routes


def modules_of() -> list[str]:
    """Returns the names of the conditions that are computed from a picture, not read from a file."""
    return [name for name, kind in conditions.known().items() if not kind.endings]


def sliders(name: str) -> list[dict[str, Any] | None]:
    """Returns a preprocessor's sliders: an unused resolution, then canny's two thresholds."""
    made = conditions.known()[name]() if name != "none" else None
    if not isinstance(made, Canny):
        return []
    ends = (("Low Threshold", made.low), ("High Threshold", made.high))
    return [None, *({"name": text, "value": value, "min": 1, "max": 255} for text, value in ends)]


def _made(maker: Condition, path: Path) -> bytes:
    """Returns the PNG of a picture's condition."""
    return writing.png(maker.make(reading.picture(path)))


def _options(name: str) -> dict[str, str]:
    """Returns what A1111 says of a sampler: whether its pictures depend on ENSD, the seed of fresh noise."""
    return {"uses_ensd": "True"} if samplers.known()[name].fresh else {}


def _upscaler(name: str) -> dict[str, Any]:
    return {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}


def _lora(one: Entry, known: dict[str, Any]) -> dict[str, Any]:
    words = {word: count for word, count in known.get("words", [])}
    metadata = {"ss_base_model_version": known.get("base", ""), "ss_tag_frequency": {"tags": words} if words else {}}
    return {"name": one.name, "alias": one.name, "path": one.name, "metadata": metadata}
