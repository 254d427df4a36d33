"""Settings of ControlNets and their pictures, a part of the tasks in settings.py."""

import dataclasses
from typing import Annotated, Any

from sdjax import conditions
from sdjax.conditions import depth
from sdjax.sampling.choices import MODES
from sdjax.sampling.fields import Finite, Setting, Share, declared
from sdjax.settings import SettingError


@declared
class Controls:
    control: Annotated[
        tuple[str, ...],
        Setting(
            "ControlNets: diffusers folders, hub ids, files, or shapes such as random:sd15",
            "ControlNet",
            file=True,
            mine=True,
            private=True,
        ),
    ] = ()
    control_image: Annotated[
        tuple[str, ...],
        Setting(
            "condition picture of each ControlNet: edges, depth, pose ...", "Control image", file=True, private=True
        ),
    ] = ()
    weight: Annotated[
        tuple[Finite, ...], Setting("strength of each ControlNet; one number for all", "Weight", needs="control")
    ] = (1.0,)
    start: Annotated[
        tuple[Share, ...], Setting("share of the steps at which each ControlNet starts", "Start", needs="control")
    ] = (0.0,)
    end: Annotated[
        tuple[Share, ...], Setting("share of the steps at which each ControlNet ends", "End", needs="control")
    ] = (1.0,)
    preprocess: Annotated[
        tuple[str, ...],
        Setting(
            "compute each condition from its picture: canny, scribble, softedge, lines, depth; settings as in"
            " canny:low=50; openpose draws a JSON file; one for all",
            "Preprocess",
            needs="control",
        ),
    ] = ()
    depth_model: Annotated[
        str,
        Setting(
            "depth model: a folder or hub id for transformers",
            "Depth model",
            file=True,
            mine=True,
            private=True,
            needs="preprocess",
        ),
    ] = depth.USUAL
    control_mode: Annotated[
        tuple[Annotated[str, MODES], ...],
        Setting(
            "what matters more: balanced; prompt weakens a ControlNet on fine maps; control does too and acts on the"
            " prompt's side of guidance only, for short prompts; one for all",
            "Control mode",
            needs="control",
        ),
    ] = ("balanced",)

    @staticmethod
    def spelled(values: dict) -> dict:
        """Returns the values with `guess`, the older name of the mode for short prompts, as a control mode."""
        if "guess" not in values:
            return values
        values = dict(values)
        return {"control_mode": ("control" if values.pop("guess") is True else "balanced",), **values}

    def rule(self) -> None:
        count = len(self.control)
        if len(self.control_image) != count:
            raise SettingError("control_image", self.control_image, f"{count}, as many as ControlNets")
        for name in ("weight", "start", "end", "preprocess", "control_mode"):
            if len(getattr(self, name)) not in (1, count or 1, 0 if name == "preprocess" else 1):
                raise SettingError(name, getattr(self, name), f"one, or {count} as there are ControlNets")
        self.makers()

    def makers(self) -> list[Any]:
        """Returns the condition to compute from each picture; None for a picture that is a condition.

        Raises SettingError for an unknown condition; only depth_model may name a model.
        """
        try:
            made = [conditions.of(text, public=True) for text in self.preprocess]
        except SettingError as error:
            raise SettingError("preprocess", error.value, error.expected) from None
        made = [dataclasses.replace(one, model=self.depth_model) if one.name == "depth" else one for one in made]
        return made * (len(self.control) // len(made)) if made else [None] * len(self.control)
