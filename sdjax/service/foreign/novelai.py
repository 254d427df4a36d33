"""JSON comments such as NovelAI's: PNG chunks `Comment` (numbers) and `Description` (the prompt)."""

from collections.abc import Mapping
from typing import Any

from sdjax.service.foreign.kind import Kind, parsed, sampled, sized, texts


def read(held: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """Returns the settings of a comment that names steps and a seed."""
    found = parsed(held, "Comment")
    if not {"steps", "seed"} <= found.keys():
        return None
    said = texts(found, prompt="prompt", negative_prompt="uc", seed="seed", steps="steps", guidance="scale")
    said.setdefault("prompt", held.get("Description", ""))
    schedule = sampled(found.get("sampler"), found.get("noise_schedule"))
    return {**said, **schedule, **sized(found.get("width"), found.get("height"))}


KIND = Kind("NovelAI", read)
