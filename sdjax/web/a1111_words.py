"""Translates A1111's API into settings: bodies of txt2img and img2img, ControlNet units, options.

Settings declare their names there (`api=`) and A1111's defaults (`unsaid`).  Unknown keys are ignored, as in A1111;
`notes` lists keys that would change the picture but that sdjax does not have.
Source: AUTOMATIC1111's stable-diffusion-webui 1.10, modules/api; sd-webui-controlnet, external code.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdjax import conditions
from sdjax.conditions.condition import Condition
from sdjax.sampling.choices import MODES, NOISES, SAMPLERS, SCHEDULES
from sdjax.sampling.fields import NOTHING, Field, Size, fields
from sdjax.sampling.hires_settings import Hires
from sdjax.sampling.settings import TASKS, Sampling
from sdjax.service import records, styles
from sdjax.service.styles import Style
from sdjax.settings import SettingError

Keep = Callable[[object, str], Awaitable[str]]  # (base64, setting) -> the name of an upload
STEPS = 50  # default of a body
USUAL = Size(512, 512)  # the other side of one that a body says, and both sides for hires fix in pixels
MOST_UNITS = 4  # most ControlNets of one picture
RESIZE = {0: "stretch", 1: "crop", 2: "fill"}  # resize_mode of pictures
UNIT_RESIZE = {  # of ControlNet units, as numbers and as their texts
    0: "stretch", 1: "crop", 2: "fill", "Just Resize": "stretch", "Crop and Resize": "crop", "Resize and Fill": "fill",
    "Inner Fit (Scale to Fit)": "crop", "Outer Fit (Shrink to Fit)": "fill", "Scale to Fit (Inner Fit)": "crop",
    "Envelope (Outer Fit)": "fill",
}  # fmt: skip
NO_NAME = ("", "None", "none", "Automatic", None)
SAME = ("Use same sampler", "Use same scheduler")  # of hires fix
UNHEARD = ("restore_faces", "refiner_checkpoint", "hr_checkpoint_name")
NOT_ASKED = (None, "", False, 0, "None", "Use same checkpoint")


@dataclass
class Asked:
    """The contents of a body: task, settings, number of pictures, and notes on what sdjax ignores.

    styles: names of the styles in the prompts.
    """

    task: str
    values: dict[str, Any]
    count: int = 1
    notes: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)


async def of_body(
    kind: str,
    body: Mapping[str, Any],
    options: Mapping[str, Any],
    keep: Keep,
    upscalers: Sequence[str] = (),
    known_styles: Mapping[str, Style] | None = None,
) -> Asked:
    """Returns the contents of a body of "txt2img" or "img2img".

    options: the server's.  keep: stores a picture of the body.  upscalers: names that /upscalers lists.
    known_styles: {name: Style} that `styles` may name.
    Raises SettingError for an invalid value.
    """
    options = {**options, **_object(body, "override_settings")}
    units = _units(body)
    masked = kind == "img2img" and body.get("mask") is not None
    task = "controlnet" if units else "inpaint" if masked else "img2img" if kind == "img2img" else "text2img"
    asked = Asked(task, _usual(task) | _of_options(options) | _of_text(body, task))
    asked.values |= _named(task, body)
    _styled(asked, body, known_styles or {})
    if kind == "img2img":
        await _begun(asked, body, keep, masked)
    else:
        _twice(asked, body, upscalers)
    if units:
        await _controlled(asked, units, keep)
    asked.count = _count(body, "batch_size") * _count(body, "n_iter")
    asked.notes += [f"sdjax does not have {name}" for name in UNHEARD if body.get(name) not in NOT_ASKED]
    known = fields(TASKS[task])
    asked.values = {name: value for name, value in asked.values.items() if name in known and value is not None}
    if _told_twice(asked.values):
        asked.values.pop("schedule")
    if not asked.values.get("variation"):
        asked.values.pop("variation_seed", None)
    return asked


def spelled(name: str) -> str:
    """Returns the name of a setting in A1111's API."""
    for task in TASKS.values():
        if name in fields(task):
            return fields(task)[name].about.api or name
    return name


def _usual(task: str) -> dict[str, Any]:
    """Returns {name: value} of A1111's defaults; the size is the model's."""
    known = fields(TASKS[task])
    said = {name: one.about.unsaid for name, one in known.items() if one.about.unsaid not in (NOTHING, "")}
    return {**{name: value for name, value in said.items() if name != "size"}, "steps": STEPS, "seed": -1}


def _named(task: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in a body whose keys the declarations know."""
    found = {}
    for name, one in fields(TASKS[task]).items():
        if one.about.api and one.about.api in body and body[one.about.api] not in (None, ""):
            found[name] = body[one.about.api]
    found.pop("mask_blur", None)
    sides = [body.get(side) for side in ("width", "height")]
    if any(sides):
        sides = [side or usual for side, usual in zip(sides, (USUAL.width, USUAL.height), strict=True)]
    if all(isinstance(side, int) and side > 0 for side in sides):
        found["size"] = f"{sides[0]}x{sides[1]}"
    if "sampler" not in found and body.get("sampler_index"):
        found["sampler"] = body["sampler_index"]  # its name before 1.0
    found.pop("prompt", None)
    found |= {name: str(body[name]) for name in ("prompt", "negative_prompt") if body.get(name) is not None}
    if not found.get("churn_high"):
        found.pop("churn_high", None)  # 0 means no bound
    for name in ("sampler", "schedule"):
        if name in found and not isinstance(found[name], str):
            raise SettingError(name, found[name], "a name")
    return found


def _told_twice(values: Mapping[str, Any]) -> bool:
    """Returns whether an old sampler name sets the schedule, "DPM++ 2M Karras", and no other key does."""
    sampler = values.get("sampler")
    head = str(sampler).rpartition(" ")[0]
    old = SAMPLERS.ours(sampler) not in SAMPLERS and SAMPLERS.ours(head) in SAMPLERS
    return old and SCHEDULES.ours(values.get("schedule")) == "automatic"


def _styled(asked: Asked, body: Mapping[str, Any], known: Mapping[str, Style]) -> None:
    """Puts the prompts, those of hires fix too, into the styles that a body names; notes unknown ones."""
    given, values = body.get("styles"), asked.values
    if not isinstance(given, list):
        return
    asked.styles = [name for name in given if isinstance(name, str) and name in known]
    asked.notes += [f"styles has no {name!r}" for name in given if name not in asked.styles]
    for before in ("", "hires_"):
        names = f"{before}prompt", f"{before}negative_prompt"
        texts = styles.applied([known[name] for name in asked.styles], *(str(values.get(name, "")) for name in names))
        values |= {name: text for name, text in zip(names, texts, strict=True) if not before or name in values}


def _of_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in the server's options."""
    found: dict[str, Any] = {}
    if options.get("sd_model_checkpoint") not in NO_NAME:
        found["model"] = options["sd_model_checkpoint"]
    if options.get("sd_vae") not in NO_NAME:
        found["vae"] = options["sd_vae"]
    if isinstance(options.get("CLIP_stop_at_last_layers"), (int, float)):
        found["clip_skip"] = max(1, int(options["CLIP_stop_at_last_layers"]))
    if isinstance(options.get("randn_source"), str):
        found["noise_source"] = NOISES.ours(options["randn_source"])
    if options.get("eta_noise_seed_delta"):
        found["ensd"] = options["eta_noise_seed_delta"]
    return found


def _of_text(body: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Returns the settings of the text in `infotext`, defaults for the body; never a file."""
    if not isinstance(body.get("infotext"), str) or not body["infotext"].strip():
        return {}
    record, known = records.parse(body["infotext"]), fields(TASKS[task])
    return {name: value for name, value in record.settings.items() if name in known and not _ours(known[name])}


def _ours(one: Field) -> bool:
    return one.about.file or one.about.mine


def _twice(asked: Asked, body: Mapping[str, Any], upscalers: Sequence[str]) -> None:
    """Translates hires fix, whose strength is denoising_strength."""
    values = asked.values
    values.pop("strength", None)
    if not body.get("enable_hr"):
        for name in fields(Hires):
            values.pop(name, None)
        return
    values.setdefault("hires", 2.0)
    wanted = [body.get(f"hr_resize_{axis}") or 0 for axis in "xy"]
    if any(wanted):
        values["hires"] = _enlargement(asked, wanted)
    if values.get("hires_steps") in (0, None):
        values.pop("hires_steps", None)
    for name in ("hires_sampler", "hires_schedule"):
        if values.get(name) in SAME:
            values.pop(name)
    old = Sampling.spelled({"sampler": values.get("hires_sampler")})
    if "schedule" in old:  # a sampler's name from before 1.9
        values |= {f"hires_{name}": value for name, value in old.items()}
    _enlarger(asked, upscalers)


def _enlarger(asked: Asked, upscalers: Sequence[str]) -> None:
    """Replaces an upscaler that hires fix does not run, a listed model or a kind of Latent, by the nearest one."""
    choices, name = fields(Hires)["hires_method"].choices, asked.values.get("hires_method")
    if choices is None or not isinstance(name, str) or choices.ours(name) in choices:
        return
    if name in upscalers or name.startswith(choices["latent"]):
        near = choices.near(name)
        asked.values["hires_method"] = near
        asked.notes.append(f"hr_upscaler {name!r} acts as {choices[near]} in hires fix")


def _enlargement(asked: Asked, wanted: Sequence[Any]) -> float:
    """Returns the scale from the size to the `wanted` width and height; 0: it follows from the other.

    Source: A1111's calculate_target_resolution, which enlarges to cover both, and then cuts; that is noted.
    """
    for name, value in zip(("hr_resize_x", "hr_resize_y"), wanted, strict=True):
        if type(value) is not int or value < 0:
            raise SettingError(name, value, "pixels, a whole number")
    size = Size.of(asked.values.setdefault("size", str(USUAL)))
    sides = size.width, size.height
    scale = max(one / side for one, side in zip(wanted, sides, strict=True))
    made = [round(scale * side) for side in sides]
    if all(wanted) and made != wanted:
        asked.notes.append(f"sdjax makes {made[0]}x{made[1]} and does not cut it to {wanted[0]}x{wanted[1]}")
    return scale


async def _begun(asked: Asked, body: Mapping[str, Any], keep: Keep, masked: bool) -> None:
    """Adds img2img's start picture and its mask."""
    values = asked.values
    for name in fields(Hires):
        values.pop(name, None)
    given = body.get("init_images")
    if not isinstance(given, list) or not given:
        raise SettingError("init_images", given, "a list with a picture in base64")
    if len(given) > 1:
        asked.notes.append("sdjax uses the first of several init_images")
    values["image"] = await keep(given[0], "init_images")
    values.setdefault("strength", 0.75)
    values["resize"] = _one_of(RESIZE, body.get("resize_mode", 0), "resize_mode")
    if not masked:
        for name in ("feather", "masked_content"):
            values.pop(name, None)
        return
    values["mask"] = await keep(body["mask"], "inverted mask" if body.get("inpainting_mask_invert") else "mask")
    if body.get("inpaint_full_res"):
        values["margin"] = body.get("inpaint_full_res_padding", 32)


def _units(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the enabled ControlNet units of a body."""
    scripts = {str(name).lower(): value for name, value in _object(body, "alwayson_scripts").items()}
    held = scripts.get("controlnet") or {}
    given = held.get("args", []) if isinstance(held, dict) else held
    units = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    units = [one for one in units if one.get("enabled", True) and one.get("model") not in NO_NAME]
    if len(units) > MOST_UNITS:
        raise SettingError("controlnet", len(units), f"at most {MOST_UNITS} units")
    return units


async def _controlled(asked: Asked, units: list[dict[str, Any]], keep: Keep) -> None:
    """Adds ControlNets, each with a model, a picture, a weight and a range of steps."""
    values, begun = asked.values, asked.values.get("image")
    pictures = []
    for unit in units:
        given = unit.get("image", unit.get("input_image"))
        given = given.get("image") if isinstance(given, dict) else given
        if not given and begun is None:
            raise SettingError("controlnet image", given, "a picture in base64")
        pictures.append(await keep(given, "controlnet image") if given else begun)
    makers = [_maker(unit) for unit in units if unit.get("module") not in NO_NAME]
    if makers and len(makers) != len(units):
        raise SettingError("module", makers[0], "none, for pictures that a preprocessor made")
    values |= {"preprocess": makers} if makers else {}
    values |= {
        "control": [unit["model"] for unit in units],
        "control_image": pictures,
        "weight": [unit.get("weight", 1.0) for unit in units],
        "start": [unit.get("guidance_start", 0.0) for unit in units],
        "end": [unit.get("guidance_end", 1.0) for unit in units],
        "control_mode": [_mode(unit) for unit in units],
    }
    resize = _one_of(UNIT_RESIZE, units[0].get("resize_mode", 1), "resize_mode")
    if begun is None:
        if resize != "crop":
            asked.notes.append("resize_mode of units acts as Crop and Resize where there is no init_image")
        for name in ("strength", "feather", "masked_content"):
            values.pop(name, None)


def _mode(unit: Mapping[str, Any]) -> str:
    """Returns a unit's control mode; `guessmode` is the older name of the one for short prompts."""
    given = unit.get("control_mode", 2 if unit.get("guessmode") else 0)
    mode = MODES.ours(given)
    if isinstance(given, bool) or mode not in MODES:
        raise SettingError("control_mode", given, f"0, 1, 2 or one of {', '.join(MODES.values())}")
    return str(mode)


def _maker(unit: Mapping[str, Any]) -> str:
    """Returns a unit's condition as text, with canny's two thresholds if the unit has them."""
    name, ends = str(unit["module"]), [unit.get(f"threshold_{one}") for one in "ab"]
    given = name == "canny" and all(isinstance(end, (int, float)) and end > 0 for end in ends)
    return f"canny:low={ends[0]:g},high={ends[1]:g}" if given else name


def preprocessor(unit: Mapping[str, Any]) -> Condition:
    """Returns the condition of a unit's module.  Raises SettingError for an unknown module."""
    return conditions.of(_maker({"module": "", **unit}), public=True)


def _one_of(table: Mapping[Any, str], value: Any, name: str) -> str:
    try:
        return table[value]
    except (KeyError, TypeError):
        raise SettingError(name, value, f"one of {', '.join(map(str, table))}") from None


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if value is None:
        return 1
    if type(value) is not int or not 1 <= value <= 100:
        raise SettingError(name, value, "a whole number, 1 to 100")
    return value


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    return value if isinstance(value, dict) else {}
