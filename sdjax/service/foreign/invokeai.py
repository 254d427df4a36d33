"""InvokeAI's metadata in a picture: PNG chunks `invokeai_metadata`, and `sd-metadata` before version 3."""

import re
from collections.abc import Mapping
from typing import Any

from sdjax.service.foreign.kind import Kind, parsed, sampled, sized, texts

UNWANTED = re.compile(r"\[([^\[\]]*)\]")  # before version 3 the negative prompt is in brackets


def read(held: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """Returns the settings of either form."""
    now = parsed(held, "invokeai_metadata")
    if now:
        said = texts(now, prompt="positive_prompt", negative_prompt="negative_prompt", seed="seed", steps="steps",
                     guidance="cfg_scale")  # fmt: skip
        return {**said, **sampled(now.get("scheduler")), **sized(now.get("width"), now.get("height"))}
    old = parsed(held, "sd-metadata").get("image")
    if not isinstance(old, dict):
        return None
    prompt = old.get("prompt")
    if isinstance(prompt, list):
        prompt = ", ".join(str(one.get("prompt", "")) for one in prompt if isinstance(one, dict))
    prompt = prompt if isinstance(prompt, str) else ""
    said = texts(old, seed="seed", steps="steps", guidance="cfg_scale")
    said |= {"prompt": UNWANTED.sub("", prompt).strip(), "negative_prompt": ", ".join(UNWANTED.findall(prompt))}
    return {**said, **sampled(old.get("sampler")), **sized(old.get("width"), old.get("height"))}


KIND = Kind("InvokeAI", read)
