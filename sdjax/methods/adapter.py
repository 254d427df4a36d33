"""An adapter in memory: the result of a method, or the contents of a file."""

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
    """Changes to a model.

    edits: {part: {weight's name: Edit}}, see edits.py.  words: {word: {text encoder: rows [n C]}}.
    hook: changes what layers compute; a PyTreeNode, with the field `strength` if it comes from a file, or None.
    conditioner: changes the network's inputs at every denoising step; likewise a PyTreeNode or None.
    own: {method: data that it reads}, for the model's reference.own.
    trees: {name: tree} for a single format, such as E4T's head and offsets.
    about: {"method", "settings"} of its origin, plain values.
    model: the model folder to write it into; None for a file of its own.
    family: the family of its base model, which names the parts in files.
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
        """Whether it has only words, which have no strength."""
        others = self.edits or self.trees or self.hook is not None or self.conditioner is not None
        return bool(self.words) and not others
