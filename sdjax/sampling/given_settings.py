"""Settings of given pictures and masks, parts of the tasks in settings.py."""

from typing import Annotated, Any

from annotated_types import Interval

from sdjax.sampling.choices import CONTENTS, FITS
from sdjax.sampling.fields import Setting, Size, declared


@declared
class Picture:
    image: Annotated[
        str | None,
        Setting(
            "the picture to start from; in text2img: the subject, for a model with an E4T encoder",
            "Image",
            own=True,
            file=True,
            private=True,
        ),
    ] = None


@declared
class Fit:
    resize: Annotated[str, FITS, Setting("how to fit the given picture to the size", "Resize", needs="image")] = "crop"

    def target(self: Any) -> tuple[Size | None, str]:
        """Returns (the size to resize given pictures to, or None for their own; the way to fit them)."""
        return self.size, self.resize


@declared
class Start:
    strength: Annotated[
        float | None,
        Interval(gt=0, le=1),
        Setting(
            "how much of the picture to repaint",
            "Denoising strength",
            "denoising_strength",
            always=True,
            needs="image",
        ),
    ] = None


@declared
class Masking:
    mask: Annotated[
        str | None,
        Setting(
            "a picture of the same size, white where to paint", "Mask", own=True, needs="image", file=True, private=True
        ),
    ] = None
    feather: Annotated[
        int,
        Interval(ge=0, le=100_000),
        Setting("width in pixels of the fade inside the mask", "Feather", "mask_blur", needs="mask"),
    ] = 4
    margin: Annotated[
        int | None,
        Interval(ge=0, le=100_000),
        Setting(
            "paint only the masked region and at least this many pixels around it, at `size`; the rest keeps its size",
            "Margin",
            needs="mask",
        ),
    ] = None

    masked_content: Annotated[
        str,
        CONTENTS,
        Setting(
            "what a strength below 1 starts from under the mask: the picture, the colours around it, noise, nothing",
            "Masked content",
            "inpainting_fill",
            needs="mask",
        ),
    ] = "original"
