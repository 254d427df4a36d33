"""Pictures of kohya's sd-scripts: PNG chunks of gen_img, and names of a training's samples.

gen_img writes `prompt`, `negative-prompt`, `seed`, `steps`, `scale` and `sampler`.  A sample's name ends in its seed:
NAME_000100_00_20231101123456_42.png, with e000002 for an epoch.
"""

import re
from collections.abc import Mapping
from typing import Any

from sdjax.service.foreign.kind import Kind, sampled, texts

SAMPLE = re.compile(r"(?:.*_)?e?\d{6}_\d{2}_\d{14}_(\d{1,19})\.(?:png|jpg|webp)")


def read(held: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """Returns the settings of the chunks, else the seed in the name."""
    if {"prompt", "steps", "scale"} <= held.keys():
        said = texts(
            held, prompt="prompt", negative_prompt="negative-prompt", seed="seed", steps="steps", guidance="scale"
        )
        return {**said, **sampled(held.get("sampler"))}
    sample = None if "parameters" in held else SAMPLE.fullmatch(name)
    return {"seed": int(sample[1])} if sample else None


KIND = Kind("kohya", read)
