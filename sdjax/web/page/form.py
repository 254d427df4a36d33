"""Controls for a picture's settings, made from their declarations (sampling/settings.py), and their values.

form = build(["steps", "sampler"])                  components in the open block
values(task, {"steps": 20, "eta": ""})              values for orders; "" is the default
"""

from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from sdjax.sampling.fields import LARGEST, Field, Size, checked, fields
from sdjax.sampling.settings import TASKS
from sdjax.service import orders

LABELS = {
    "prompt": "Describe the picture", "negative_prompt": "Leave out", "cfg": "Guidance", "hires": "Enlarge by",
    "vae": "Autoencoder", "ensd": "Seed delta (ENSD)", "eta": "Fresh noise (eta)", "control_mode": "What matters more",
    "image": "Picture", "strength": "How much changes", "hires_strength": "How much the enlarged one changes",
}  # fmt: skip
HELP = {  # replaces help texts that are about the command line
    "model": "the model; the Library tab lists all", "vae": "another autoencoder to decode the picture",
    "seed": "the same seed and settings make the same picture; -1 draws a new seed",
    "size": "width x height in pixels; or type another size",
    "adapter": "as <lora:NAME:1>; the cards above add them to the prompt",
    "prompt": "what the picture shows", "negative_prompt": "what it should not show",
}  # fmt: skip
TITLES = {
    "Sampling": "Quality: steps, sampler, guidance", "Variation": "Small variations of one picture",
    "Reading": "How the prompt is read", "Noise": "Noise", "Guidance": "Guidance, fine", "Fit": "Fit of the picture",
    "Start": "Changes", "Masking": "Repainted part", "Hires": "Larger picture (hires fix)", "Enlarging": "Enlarging",
    "Controls": "Shapes to follow (ControlNet)", "Frames": "From one picture to another", "Model": "Add-ons",
}  # fmt: skip
SLIDERS = {"steps": (1, 100, 1), "guidance": (0, 20, 0.5), "clip_skip": (1, 4, 1), "frames": (2, 64, 1),
           "feather": (0, 64, 1), "noise_level": (0, 350, 1)}  # fmt: skip
WIDEST = 1000  # steps of a slider
SIZES = ("512x512", "512x768", "768x512", "768x768", "640x960", "960x640", "1024x1024")


def every() -> dict[str, Field]:
    """Returns {name: Field} of all tasks' settings that a browser may set."""
    found: dict[str, Field] = {}
    for task in TASKS.values():
        for name, one in fields(task).items():
            if name in orders.NAMED or not one.about.mine:
                found.setdefault(name, one)
    return found


def of(task: str) -> dict[str, Field]:
    """Returns {name: Field} of a task's settings that a browser may set."""
    there = every()
    return {name: one for name, one in fields(TASKS[task]).items() if name in there}


def label(name: str) -> str:
    """Returns the label of a setting on the page."""
    return LABELS.get(name) or name.replace("_", " ").capitalize()


def help_of(one: Field) -> str:
    """Returns a setting's help as a sentence, safe in a label."""
    text = HELP.get(one.name, one.about.help)
    return escape(f"{text[:1].upper()}{text[1:]}.", quote=False)


def control(one: Field, **more: Any) -> Any:
    """Returns the component of a setting, in the open block."""
    known: dict[str, Any] = {"label": label(one.name), "info": help_of(one), "elem_id": f"set-{one.name}", **more}
    if one.name == "size":
        choices = [("The model's own size", ""), *((text.replace("x", " × "), text) for text in SIZES)]
        return gr.Dropdown(choices, value="", allow_custom_value=True, filterable=True, **known)
    if one.name in orders.NAMED:
        return gr.Dropdown([(usual_name(one.name), "")], value="", allow_custom_value=True, **known)
    if one.kind is bool:
        return gr.Checkbox(bool(one.usual), **known)
    if one.choices is not None:
        choices = [(theirs, ours) for ours, theirs in one.choices.items()]
        choices = [("Default", ""), *choices] if one.optional else choices
        return gr.Dropdown(choices, value=one.usual or "", **known)
    if one.kind in (int, float) and not one.several and one.usual is not None:
        return _number(one, known)
    usual = "" if one.usual in (None, ()) else shown(one.usual)
    return gr.Textbox(usual, **{"placeholder": "default" if one.optional else "", "max_lines": 4, **known})


def usual_name(name: str) -> str:
    """Returns the label of an empty setting that names an entry of the library."""
    return "The default model" if name == "model" else "The model's own"


def _number(one: Field, known: dict[str, Any]) -> Any:
    low, high = getattr(one.span, "ge", None), getattr(one.span, "le", None)
    low = getattr(one.span, "gt", None) if low is None else low
    step = 1 if one.kind is int else one.about.step
    if one.name in SLIDERS:
        low, high, step = SLIDERS[one.name]
    if low is None or high is None or abs(low) >= LARGEST or (high - low) / step > WIDEST:
        return gr.Number(one.usual, precision=0 if one.kind is int else None, **known)
    return gr.Slider(low, high, one.usual, step=step, **known)


def shown(value: Any) -> Any:
    """Returns a setting's value for its control."""
    if value is None:
        return ""
    if isinstance(value, Size):
        return str(value)
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def begun(one: Field) -> Any:
    """Returns the initial value of a setting's control, for a task without a value."""
    return shown(one.usual if one.usual is not None else every()[one.name].usual)


def filled(one: Field, value: Any) -> Any:
    """Returns the update that shows a value, also above a slider's maximum; None is the initial value."""
    value = begun(one) if value is None else shown(value)
    if one.name in SLIDERS and isinstance(value, (int, float)):
        return gr.update(value=value, maximum=max(SLIDERS[one.name][1], value))
    return gr.update(value=value)


def values(task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {name: value} for orders from controls; leaves out "" and settings that need another one.

    Raises SettingError for an invalid value.
    """
    known, found = of(task), {}
    for name, one in known.items():
        value = given.get(name)
        if name in ("prompt", "negative_prompt"):
            found[name] = value or ""
        elif value not in (None, "", []):
            found[name] = _value(one, value)
    for name in list(found):
        needed = known[name].about.needs
        if needed in known and known[needed].usual in (None, ()) and not found.get(needed):
            del found[name]
    return found


def _value(one: Field, value: Any) -> Any:
    if one.name in orders.NAMED or one.about.file:
        return value
    if one.several and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if one.kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    return checked(one, value, text=True)
