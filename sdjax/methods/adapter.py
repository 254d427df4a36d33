"""An adapter in memory: what a method learned, or what a file brings to a model."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax

from sdjax.stable_diffusion import StableDiffusion


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["edits", "words", "hook", "trees", "model"],
    meta_fields=["about"],
)
@dataclass(frozen=True, eq=False)
class Adapter:
    """What acts on a model.

    edits: {part: {weight's name: Edit}}.  hook: what layers compute, or None.
    words: {word: {text encoder: rows [n C]}}.
    trees: {name: tree} of what only one kind of file knows, such as E4T's head and offsets.
    about: {"method", "settings"} of who learned it, plain values.
    model: the model that it belongs into and is written with; None where it is a file of its own.
    """

    edits: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)
    hook: Any = None
    trees: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    model: StableDiffusion | None = None

    @property
    def kind(self) -> str:
        """What it is called in prompts: "lora", "hypernet" or "embedding"."""
        return "lora" if self.edits else "hypernet" if self.hook is not None else "embedding"
