"""CLIP-I and CLIP-T of a run's previews, measured by the CLIP of the setting `judge`.

    judged = Judged(settings, data, out / FILE, start)
    found = judged(made, prompts)                # {"clip-i": 0.71, "clip-t": 0.25}
    judged.add(step, found)
    judged.best, judged.waited                   # as of validation.Validation; larger figures are better

judge.json holds {step: figures}; a run that resumes at a step drops later ones.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.data.batches import Batches
from sdjax.formats import judge
from sdjax.formats.storage import files
from sdjax.methods import likeness
from sdjax.methods.chain import Chain
from sdjax.runtime import processes
from sdjax.settings import SettingError
from sdjax.training import validation

FILE = "judge.json"
NEED_TEXTS = ("clip-t", "clip")  # values of `best`
MOST = 64  # pictures of the subject to compare with


class Judged:
    """The history of a run's figures; `values`: [(step, -score)] in order, so that the smallest is the best."""

    def __init__(self, settings: Any, data: Batches, place: Path, start: int = 0) -> None:
        self.settings, self.data, self.place = settings, data, place
        self.judge = judge.load(settings.judge) if processes.first() else None
        if self.judge is not None and settings.best in NEED_TEXTS and self.judge.reference.clip is None:
            raise SettingError("best", settings.best, "clip-i: the judge has no text encoder with a projection")
        self.found = {step: figures for step, figures in history(place).items() if step <= start}

    def __call__(self, made: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
        """Returns the figures of pictures uint8 [H W 3] and their prompts, see likeness.figures."""
        assert self.judge is not None
        return likeness.figures(self.judge, made, self.own, [plain(text, self.settings) for text in prompts])

    @functools.cached_property
    def own(self) -> np.ndarray:
        """Embeddings of up to MOST training pictures, evenly spaced."""
        assert self.judge is not None
        source, size = self.data.source, self.data.size
        numbers = np.unique(np.linspace(0, len(source) - 1, min(MOST, len(source))).astype(int))
        return likeness.images(self.judge, [source.picture(int(i), size) for i in numbers])

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Stores the figures of a step."""
        self.found = {**{one: value for one, value in self.found.items() if one != step}, step: figures}
        if processes.first():
            with files.new_file(self.place) as temporary:
                files.write_json(temporary, {str(step): figures for step, figures in self.found.items()})

    @property
    def values(self) -> list[tuple[int, float]]:
        """The [(step, -score)] for the run's `best`."""
        return [(step, -score(figures, self.settings.best)) for step, figures in sorted(self.found.items())]

    @property
    def best(self) -> tuple[int, float] | None:
        """The (step, -score) of the largest score, the first of equal ones."""
        return validation.best(self.values)

    @property
    def waited(self) -> int:
        """The number of figures after the best ones."""
        return validation.waited(self.values)


def history(place: Path) -> dict[int, dict[str, float]]:
    """Returns {step: figures} of a run's judge.json, {} without the file."""
    found = files.read_json(place) if place.is_file() else {}
    return {int(step): figures for step, figures in found.items()}


def score(figures: dict[str, float], best: Any) -> float:
    """Returns what `best` ranks: a figure, or the sum of both for "clip"."""
    return figures["clip-i"] + figures["clip-t"] if best == "clip" else figures[best]


def best_of(folder: Path, best: Any) -> tuple[int, float] | None:
    """Returns (step, value) of the best step in a run's folder by its setting `best`; None without measurements."""
    if best is True:
        return validation.best(validation.history(folder / validation.FILE))
    return validation.best([(step, -score(found, best)) for step, found in sorted(history(folder / FILE).items())])


def plain(text: str, settings: Any) -> str:
    """Returns a prompt without words that only the run knows: with the text that a word started from in its place.

    Identifiers are left out, and so is a word whose text is in the prompt already: "a photo of <new> dog" is "a photo
    of dog".
    """
    method = settings.method
    for part in method.parts if isinstance(method, Chain) else (method,):
        noun = getattr(part, "init", "") or getattr(part, "domain", "")
        for word in part.words:
            text = text.replace(word, "" if f" {noun} " in f" {text} " else noun)
    return settings.class_data.prompt(text)
