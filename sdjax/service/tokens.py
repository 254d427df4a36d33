"""Counts the tokens of a prompt from a model's vocabulary, without loading the model.

tokens = Tokens(library)
tokens.count("pocket", "a photo of a cat")          # (5, 30): of so many that one part of a prompt has
"""

from pathlib import Path

from sdjax.formats import pipeline
from sdjax.formats.adapters import kinds
from sdjax.service.library import Library
from sdjax.settings import SettingError
from sdjax.text import grammars
from sdjax.text.tokenizer import Tokenizer

ENDS = 2  # tokens of a part that are no words: its begin and its end


class Tokens:
    """The vocabularies of a library's models, each read once."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.held: dict[Path, Tokenizer | None] = {}

    def of(self, model: str) -> Tokenizer | None:
        """Returns the vocabulary of a model by its name in the library, None where it has none of its own."""
        try:
            folder = pipeline.locate(self.library.find("model", model or self.library.own.name).source) / "tokenizer"
        except (SettingError, ValueError, OSError):
            return None
        if folder not in self.held:
            self.held[folder] = Tokenizer.load(folder) if folder.is_dir() else None
        return self.held[folder]

    def count(self, model: str, prompt: str) -> tuple[int, int] | None:
        """Returns (tokens of a prompt without its adapters, how many one part has), None where that is not known."""
        tokenizer = self.of(model)
        if tokenizer is None:
            return None
        text, _ = grammars.adapters(prompt, kinds.tags())
        return len(tokenizer.ids(text)), tokenizer.length - ENDS
