"""Random variation of a prompt: wildcards, tag order, dropped tags, a prefix.

    varied("sks, {red|blue} hat, beach", Data(keep=1, shuffle=True, wildcards=True), random)   # "sks, beach, blue hat"

Commas separate tags.  The result depends only on the prompt, the settings and `random`, which a run seeds from its seed
and the example's place in the stream.
Source: the settings of kohya's sd-scripts (shuffle_caption, keep_tokens, caption_tag_dropout_rate, enable_wildcard).
"""

import re
from typing import Any

import numpy as np

CHOICE = re.compile(r"\{([^{}|]*\|[^{}]*)\}")  # innermost braces that contain a bar


def varied(prompt: str, data: Any, random: np.random.Generator) -> str:
    """Returns a variation of a prompt.

    data: a run's Data.  Applies wildcards, then tag_dropout and shuffle to all tags but the first `keep`, then prefix.
    """
    if data.wildcards:
        prompt = chosen(prompt, random)
    if data.shuffle or data.tag_dropout:
        tags = [tag for tag in (tag.strip() for tag in prompt.split(",")) if tag]
        kept, others = tags[: data.keep], tags[data.keep :]
        if data.tag_dropout:
            others = [tag for tag in others if random.random() >= data.tag_dropout]
        if data.shuffle:
            others = [others[i] for i in random.permutation(len(others))]
        prompt = ", ".join([*kept, *others])
    return f"{data.prefix} {prompt}".strip() if data.prefix else prompt


def chosen(prompt: str, random: np.random.Generator) -> str:
    """Replaces each {one|two|three} in a prompt by one of its texts with equal probability; choices may be nested."""
    while found := CHOICE.search(prompt):
        texts = found[1].split("|")
        prompt = prompt[: found.start()] + texts[random.integers(len(texts))] + prompt[found.end() :]
    return prompt
