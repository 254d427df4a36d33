"""An adapter in memory: what a method learned, or what a file brings to a model."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax

from sdjax.families.family import Family
from sdjax.families.sd import Sd
from sdjax.stable_diffusion import StableDiffusion


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["edits", "words", "hook", "conditioner", "own", "trees", "model"],
    meta_fields=["about", "family"],
)
@dataclass(frozen=True, eq=False)
class Adapter:
    """What acts on a model.

    edits: {part: {weight's name: Edit}}, see edits.py.  words: {word: {text encoder: rows [n C]}}.
    hook: what layers compute, a PyTreeNode with the field `strength` where a file brings it, or None.
    conditioner: what the network is told anew in every denoising step, with the field `strength` too, or None.
    own: {method: what it looks at}, for the model's reference.own.
    trees: {name: tree} of what only one kind of file knows, such as E4T's head and offsets.
    about: {"method", "settings"} of who learned it, plain values.
    model: the model that it belongs into and is written with; None where it is a file of its own.
    family: of the model that it is for, which says what files call its parts.
    """

    edits: dict[str, Any] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)
    hook: Any = None
    conditioner: Any = None
    own: dict[str, Any] = field(default_factory=dict)
    trees: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    model: StableDiffusion | None = None
    family: Family = Sd()

    @property
    def only_words(self) -> bool:
        """Whether it brings words and nothing else, so that no strength means anything to it."""
        others = self.edits or self.trees or self.hook is not None or self.conditioner is not None
        return bool(self.words) and not others
