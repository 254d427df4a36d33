"""Settings of a second pass at a larger size (hires fix), a part of the tasks in settings.py."""

import dataclasses
from typing import Annotated, Any

from annotated_types import Interval

from sdjax.sampling.choices import SAMPLERS, SCHEDULES
from sdjax.sampling.fields import LARGEST, Choice, Setting, Some, declared

AGAIN = (
    "prompt",
    "negative_prompt",
    "steps",
    "sampler",
    "schedule",
    "guidance",
)  # what a second pass may have of its own


@declared
class Hires:
    """A second pass at a larger size."""

    hires: Annotated[
        float | None,
        Interval(gt=0, le=64),
        Setting("scale factor of a second, larger pass (hires fix)", "Hires upscale", "hr_scale"),
    ] = None
    hires_strength: Annotated[
        Some,
        Setting(
            "how much the second pass repaints", "Denoising strength", "denoising_strength", always=True, needs="hires"
        ),
    ] = 0.7
    hires_steps: Annotated[
        int | None,
        Interval(ge=1),
        Setting(
            "steps of the second pass; default: as in the first", "Hires steps", "hr_second_pass_steps", needs="hires"
        ),
    ] = None
    hires_method: Annotated[
        str,
        Choice(latent="Latent", lanczos="Lanczos", nearest="Nearest").also(none="lanczos").rest("lanczos"),
        Setting("how to enlarge the first pass", "Hires upscaler", "hr_upscaler", always=True, needs="hires"),
    ] = "latent"

    hires_prompt: Annotated[
        str | None,
        Setting(
            "prompt of the second pass; default: as in the first",
            "Hires prompt",
            "hr_prompt",
            own=True,
            needs="hires",
            private=True,
        ),
    ] = None
    hires_negative_prompt: Annotated[
        str | None,
        Setting(
            "negative prompt of the second pass; default: as in the first",
            "Hires negative prompt",
            "hr_negative_prompt",
            own=True,
            needs="hires",
            private=True,
        ),
    ] = None
    hires_sampler: Annotated[
        str | None,
        SAMPLERS,
        Setting(
            "sampler of the second pass; default: as in the first", "Hires sampler", "hr_sampler_name", needs="hires"
        ),
    ] = None
    hires_schedule: Annotated[
        str | None,
        SCHEDULES,
        Setting(
            "noise levels of the second pass; default: as in the first",
            "Hires schedule type",
            "hr_scheduler",
            needs="hires",
        ),
    ] = None
    hires_guidance: Annotated[
        float | None,
        Interval(ge=-LARGEST, le=LARGEST),
        Setting(
            "guidance of the second pass; default: as in the first",
            "Hires CFG Scale",
            "hr_cfg",
            needs="hires",
            step=0.5,
        ),
    ] = None

    def again(self: Any) -> Any:
        """Returns the settings of the second pass."""
        own = {name: getattr(self, f"hires_{name}") for name in AGAIN}
        return dataclasses.replace(self, **{name: value for name, value in own.items() if value is not None})

    @property
    def later_texts(self) -> tuple[str, str]:
        """The prompts of both sides of guidance that only the second pass reads, "" for none."""
        return self.hires_prompt or "", self.hires_negative_prompt or ""

    def saying_later(self: Any, prompt: str) -> Any:
        """Returns the settings with another prompt of the second pass, if it has one of its own."""
        return dataclasses.replace(self, hires_prompt=prompt) if self.hires_prompt else self
