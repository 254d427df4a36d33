"""Textual inversion: one or several new rows of every text encoder's token table, and nothing else.

    TextualInversion(word="<cat-toy>", init="toy", vectors=2)

Source: Gal et al. 2022, "An Image is Worth One Word" (arXiv 2208.01618), section 3.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax import trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method, about
from sdjax.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class TextualInversion(Method):
    """Trains `vectors` rows for the placeholder `word`, which start from the rows of the text `init`."""

    word: str = "<new>"
    init: str = ""
    vectors: int = 1
    formats = ("embedding",)

    @property
    def words(self) -> tuple[str, ...]:
        """The one placeholder."""
        return (self.word,)

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({"rows": {text encoder: [vectors C]}}, sd that knows the word).

        Raises ValueError when the model knows the word with another number of vectors.
        """
        sd = sd.add_word(self.word, self.vectors, self.init or None)
        return {"rows": trees.cast(sd.rows(self.word), jnp.float32)}, sd

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd whose word stands for the trained rows."""
        return frozen.with_rows(frozen.words[self.word], trained["rows"])

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the word's rows {text encoder: [vectors C]}, float32."""
        rows = {encoder: np.asarray(some, np.float32) for encoder, some in trained["rows"].items()}
        return Adapter(words={self.word: rows}, about=about(self))
