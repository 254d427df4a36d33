"""Textual inversion: one or several new rows of every text encoder's token table, and nothing else.

    TextualInversion(word="<cat-toy>", init="toy", vectors=2)
    concepts({"<cat-toy>": "toy", "<my-dog>": "dog"})               # several words in one run: a Chain
    TextualInversion(word="<flaws>", negative=True)                 # for the negative prompt, from flawed pictures

Source: Gal et al. 2022, "An Image is Worth One Word" (arXiv 2208.01618), section 3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax import trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.chain import Chain
from sdjax.methods.method import Method, about
from sdjax.settings import FROM_0, TO_1, check
from sdjax.stable_diffusion import StableDiffusion

LEAST = 1e-6  # a row of zeros has no direction to grow in
LAYOUTS = ("diffusers", "diffusers-bin", "a1111")


@dataclass(frozen=True)
class TextualInversion(Method):
    """Trains new rows of the token table for the placeholder `word`, initialised from the text `init`.

    word: the placeholder in prompts.  vectors: number of rows.
    init: a word or phrase; its tokens' rows repeat in order.  "" is the table's mean row.  To start from a file, use
    the run's own `init=`.
    negative: use the word in negative prompts, in previews and in the printed usage; train it on flawed pictures.
    norm: pull the norm of every row towards this after each step; 0 is off.  SD 1's table has about 0.4, and pivotal
    tuning pulls to it.  pull: the share of the difference that a step removes.
    layout: diffusers (learned_embeds.safetensors), diffusers-bin (.bin) or a1111 (WORD.pt).
    """

    word: str = "<new>"
    init: str = ""
    vectors: int = 1
    negative: bool = False
    norm: float = 0.0
    pull: float = 0.05  # cloneofsimo's lora, cli_lora_pti: min(1, 100 lr), at its lr of 5e-4
    layout: str = "diffusers"
    formats = ("embedding",)

    def __post_init__(self):
        check(self, layout=LAYOUTS, norm=FROM_0, pull=TO_1)

    @property
    def words(self) -> tuple[str, ...]:
        """The one placeholder."""
        return (self.word,)

    @property
    def unwanted(self) -> tuple[str, ...]:
        """The placeholder, if it is for the negative prompt."""
        return (self.word,) if self.negative else ()

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({"rows": {text encoder: [vectors C]}}, sd with the word).

        Raises ValueError if the model already has the word with another number of vectors.
        """
        sd = sd.add_word(self.word, self.vectors, self.init or None)
        return {"rows": self._start(sd)}, sd

    def _start(self, sd):
        """Returns the word's rows in sd, float32; in `frozen` these are the rows before training."""
        return trees.cast(sd.rows(self.word), jnp.float32)

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd with the trained rows for its word."""
        return frozen.with_rows(frozen.ids(self.word), trained["rows"])

    @property
    def project(self) -> Callable | None:
        """After every step: pulls the norms of the rows; None without `norm`."""
        return self._pulled if self.norm and self.pull else None

    def _pulled(self, trained):
        """Returns the rows with norms n + pull (norm - n) in place of n."""

        def pulled(rows):
            n = jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), LEAST)
            return rows * (1 + self.pull * (self.norm / n - 1))

        return jax.tree.map(pulled, trained)

    def measure(self, frozen: StableDiffusion, trained: Any) -> dict[str, Array]:
        """Returns {"norm WORD", "drift WORD"}: the mean norm of the rows, and of their difference from the start.

        Rows with a far larger norm than the table's, about 0.4 in SD 1, drown out the other words of a prompt.
        """
        rows, start = trained["rows"], self._start(frozen)
        moved = jax.tree.map(jnp.subtract, rows, start)
        return {f"norm {self.word}": _length(rows), f"drift {self.word}": _length(moved)}

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the word's rows {text encoder: [vectors C]}, float32."""
        rows = {encoder: np.asarray(some, np.float32) for encoder, some in trained["rows"].items()}
        return Adapter(words={self.word: rows}, about=about(self))


def _length(rows):
    """Returns the mean norm of rows {text encoder: [n C]}."""
    return jnp.mean(jnp.concatenate([jnp.linalg.norm(some, axis=-1) for some in rows.values()]))


def concepts(starts: Mapping[str, str], vectors: int = 1, **settings: Any) -> Chain:
    """Returns the method that trains several words {word: init}, each with the pictures whose prompts contain it.

    data.words=(("cat", "<cat-toy>"), ("dog", "<my-dog>")) gives each sub-folder of pictures its word.
    """
    return Chain(tuple(TextualInversion(word, init, vectors, **settings) for word, init in starts.items()))
