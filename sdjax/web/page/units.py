"""ControlNet units of the form: model, picture, preprocessor, strength and steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from sdjax import conditions
from sdjax.sampling.choices import MODES
from sdjax.service import uploads
from sdjax.service.library import Library
from sdjax.settings import SettingError
from sdjax.web.page import marks
from sdjax.web.page.desk import Desk

# Settings that the units set.
NAMES = ("control", "control_image", "weight", "start", "end", "preprocess", "control_mode")
COUNT = 3
EACH = len(NAMES)  # components of a unit


@dataclass
class Units:
    """The units' components: EACH per unit, in the order of NAMES."""

    fold: Any
    inputs: list[Any]

    @property
    def models(self) -> list[Any]:
        """The lists of ControlNets."""
        return self.inputs[::EACH]

    def listed(self, library: Library) -> list[Any]:
        """Returns updates of the lists of ControlNets."""
        choices = [("Off", ""), *((one.name, one.name) for one in library.entries("controlnet"))]
        return [gr.update(choices=choices)] * COUNT

    def read(self, values: Sequence[Any], keep: Callable[[bytes, str], str]) -> dict[str, Any]:
        """Returns {setting: value} of the enabled units."""
        found: dict[str, list[Any]] = {name: [] for name in NAMES}
        for number in range(COUNT):
            model, image, *rest = values[number * EACH : (number + 1) * EACH]
            if not model:
                continue
            if not image:
                raise SettingError("control_image", None, f"a picture for unit {number + 1}")
            for name, value in zip(NAMES, [model, keep(Path(image).read_bytes(), "control_image"), *rest], strict=True):
                found[name].append(value)
        if not found["control"]:
            raise SettingError("control", None, "a ControlNet in the first unit; put files below --models")
        if not any(found["preprocess"]):
            found["preprocess"] = []
        elif not all(found["preprocess"]):
            raise SettingError("preprocess", found["preprocess"], "for all units or for none")
        return {name: tuple(value) for name, value in found.items()}


def build(desk: Desk) -> Units:
    """Makes the units, in the open block."""
    made: list[Any] = []
    ways = [
        ("None: the picture is a condition already", ""),
        *((f"{kind.kind} ({name})", name) for name, kind in _made().items()),
    ]
    fold = gr.Accordion("Shapes to follow (ControlNet)", open=True, visible=False, elem_id="units")
    with fold, gr.Tabs():
        for number in range(1, COUNT + 1):
            with gr.Tab(f"Unit {number}"):
                with gr.Row():
                    model = gr.Dropdown([("Off", "")], value="", label="ControlNet", elem_id=f"set-control-{number}",
                                        info="From the library.", min_width=140)  # fmt: skip
                    way = gr.Dropdown(ways, value="", label="Prepare", elem_id=f"set-preprocess-{number}",
                                      info="Computed from the picture first.", min_width=140)  # fmt: skip
                with gr.Row():
                    image = gr.Image(type="filepath", image_mode=None, format="png", sources=["upload", "clipboard"],
                                     label="Picture", height=200, elem_id=f"set-control_image-{number}",
                                     min_width=140)  # fmt: skip
                    shown = gr.Image(label="What the ControlNet sees", height=200, interactive=False, format="png",
                                     min_width=140, buttons=[], elem_id=f"seen-{number}")  # fmt: skip
                look = gr.Button("Preview", size="sm")
                problem = marks.area()
                with gr.Row():
                    weight = gr.Slider(0, 2, 1, step=0.05, label="Weight", info="How strongly the ControlNet acts.",
                                       elem_id=f"set-weight-{number}", min_width=100)  # fmt: skip
                    start = gr.Slider(0, 1, 0, step=0.05, label="Start", info="Fraction of the steps where it starts.",
                                      elem_id=f"set-start-{number}", min_width=100)  # fmt: skip
                    end = gr.Slider(0, 1, 1, step=0.05, label="End", info="Fraction of the steps where it ends.",
                                    elem_id=f"set-end-{number}", min_width=100)  # fmt: skip
                mode = gr.Dropdown([(label, name) for name, label in MODES.items()], value="balanced",
                                   label="What matters more", elem_id=f"set-control_mode-{number}",
                                   info="The prompt's choice weakens fine shapes.")  # fmt: skip
                desk.on(look.click, _previewing(desk), [image, way], [shown], problem)
                made += [model, image, weight, start, end, way, mode]
    return Units(fold, made)


def _made() -> dict[str, Any]:
    """Returns {name: kind} of the conditions that are computed from a picture."""
    return {name: kind for name, kind in conditions.known().items() if not kind.endings}


def _previewing(desk: Desk) -> Any:
    def preview(image: str | None, way: str) -> list[Any]:
        if not image:
            raise ValueError("drop a picture first")
        name = desk.services.kept(Path(image).read_bytes(), "control_image")
        return [str(desk.services.place.upload(uploads.prepared(desk.services.place, name, way)))]

    return preview
