"""Enlarges pictures without a model, like A1111's "extras"."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdjax.formats.storage import files
from sdjax.images import reading, writing
from sdjax.service.library import Entry, Library
from sdjax.service.uploads import MOST_PIXELS
from sdjax.settings import SettingError

FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
PIPELINES = ("StableDiffusionUpscalePipeline", "LDMSuperResolutionPipeline")
MOST_FACTOR = 8


@dataclass(frozen=True)
class Enlarging:
    """How to enlarge a picture: by a factor or to a size (width, height), with a filter or a model of the library."""

    factor: float = 2.0
    size: tuple[int, int] | None = None
    crop: bool = True
    filter: str = "None"
    model: str | None = None


def names(library: Library) -> list[str]:
    """Returns the names of all ways to enlarge: "None", the filters, the titles of upscaling models."""
    return ["None", *FILTERS, *(library.title(one) for one in upscalers(library))]


def upscalers(library: Library) -> list[Entry]:
    """Returns the upscaling models of the library."""
    return [one for one in library.entries("model") if one.path is not None and _enlarges(one.path)]


def _enlarges(path: Path) -> bool:
    try:
        return files.read_json(path / "model_index.json").get("_class_name") in PIPELINES
    except (ValueError, OSError):
        return False


def asked(library: Library, body: Mapping[str, Any]) -> Enlarging:
    """Returns the Enlarging of a body of extra-single-image.  Raises SettingError for unknown or unsupported values."""
    name = body.get("upscaler_1") or "None"
    models = {library.title(one): one.name for one in upscalers(library)}
    if name not in ("None", *FILTERS, *models):
        raise SettingError("upscaler_1", name, f"one of {', '.join(('None', *FILTERS, *models))}")
    for other in ("gfpgan_visibility", "codeformer_visibility", "extras_upscaler_2_visibility"):
        if body.get(other):
            raise SettingError(other, body[other], "0: sdjax does not have it")
    factor = body.get("upscaling_resize", 2)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= MOST_FACTOR:
        raise SettingError("upscaling_resize", factor, f"a number above 0, at most {MOST_FACTOR}")
    size = None
    if body.get("resize_mode") == 1:
        sides = [body.get(f"upscaling_resize_{side}") for side in "wh"]
        if not all(type(side) is int and 1 <= side <= 16384 for side in sides):
            raise SettingError("upscaling_resize_w", sides[0], "1 to 16384 pixels, with upscaling_resize_h")
        size = (int(sides[0] or 0), int(sides[1] or 0))
    return Enlarging(float(factor), size, bool(body.get("upscaling_crop", True)), name, models.get(name))


def enlarged(path: Path, how: Enlarging) -> bytes:
    """Returns an enlarged picture as PNG.  Raises SettingError if it would be too large."""
    image = Image.fromarray(reading.picture(path))
    width, height = image.size
    if how.size is None:
        to = round(width * how.factor), round(height * how.factor)
    else:
        scale = max(how.size[0] / width, how.size[1] / height)
        to = (round(width * scale), round(height * scale)) if how.crop else how.size
    if to[0] * to[1] > MOST_PIXELS or min(to) < 1:
        raise SettingError("upscaling_resize", f"{to[0]}x{to[1]}", f"at most {MOST_PIXELS} pixels")
    if how.filter != "None":
        image = image.resize(to, FILTERS[how.filter])
        if how.size is not None and how.crop:
            left, top = (image.width - how.size[0]) // 2, (image.height - how.size[1]) // 2
            image = image.crop((left, top, left + how.size[0], top + how.size[1]))
    return writing.png(image)
