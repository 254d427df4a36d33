"""Fooocus's metadata in a picture: JSON in place of A1111's text, in PNG's `parameters` or EXIF's UserComment."""

import re
from collections.abc import Mapping
from typing import Any

from sdjax.service.foreign.kind import Kind, parsed, sampled, sized, texts


def read(held: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """Returns the settings of JSON that names a resolution, such as "(1152, 896)"."""
    found = parsed(held, "parameters")
    if not {"prompt", "resolution"} <= found.keys():
        return None
    said = texts(found, prompt="prompt", negative_prompt="negative_prompt", seed="seed", steps="steps",
                 guidance="guidance_scale")  # fmt: skip
    sides = [int(side) for side in re.findall(r"\d{1,6}", str(found["resolution"]))]
    size = sized(*sides) if len(sides) == 2 else {}
    return {**said, **sampled(found.get("sampler"), found.get("scheduler")), **size}


KIND = Kind("Fooocus", read)
