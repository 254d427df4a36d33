"""Class pictures and prompts of a subject: other dogs, and "dog" instead of "sks dog".

Source: Ruiz et al. 2022, "DreamBooth" (arXiv 2208.12242), section 3.3: the loss is mean(instance) + lambda
mean(class).  Here every batch has fixed numbers of both, and row weights carry the factors.  So the mean over the batch
is that sum on any number of devices, with and without microbatches.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdjax import settings
from sdjax.settings import SettingError

PHOTO = "a photo of "  # before the class, in the prompt of a class picture without a caption


@dataclass(frozen=True)
class ClassData:
    """The class of a run's subjects, for prior preservation; off if path and identifiers are empty and draw is False.

    path: a folder of class pictures that train together with the subject's; "" for none.  `python -m sdjax class_images
    RECIPE class_data.path=FOLDER` fills it from the model before training.
    draw: draw the missing class pictures when the run starts, into `path`, or for "" into class/ of the run's folder.
    count: number of pictures to draw into it.
    prompts: prompts to draw them from, in turn; () removes the identifiers from the subject's prompts.
    rows: class rows per batch; 0 is half of data.batch.  weight: lambda, the factor of their mean loss.
    identifiers: words that distinguish the subject from its class; a prompt without them is the class prompt.
    """

    path: str = ""
    draw: bool = False
    count: int = 200
    prompts: tuple[str, ...] = ()
    rows: int = 0
    weight: float = 1.0
    identifiers: tuple[str, ...] = ()

    def __post_init__(self):
        settings.check(self, count=settings.FROM_0, rows=settings.FROM_0, weight=settings.FROM_0)
        if not all(self.identifiers):
            raise SettingError("identifiers", self.identifiers, "words, as in ('sks',)")

    def rows_of(self, batch: int) -> int:
        """Returns the number of class rows per batch; raises SettingError for none or all."""
        if not self.path:
            return 0
        rows = self.rows or batch // 2
        if not 0 < rows < batch:
            wanted = f"1 to {batch - 1} of data.batch={batch}" if batch > 1 else f"data.batch=2 or more, not {batch}"
            raise SettingError("rows", self.rows, f"{wanted}, which holds both kinds")
        return rows

    def prompt(self, text: str) -> str:
        """Returns the class prompt for a subject's prompt: "a photo of dog" for "a photo of sks dog"."""
        for word in self.identifiers:
            text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "", text)
        return re.sub(r"( ?,)+", ",", re.sub(r"\s+", " ", text)).strip(" ,")

    def changes(self, source: Any, most: int) -> bool:
        """Returns whether any of the first `most` prompts of the examples has an identifier."""
        texts = (source.caption(i, np.random.default_rng(i)) for i in range(min(len(source), most)))
        return any(self.prompt(text) != text for text in texts)

    def data(self, subject: Any) -> Any:
        """Returns the Data of the class pictures: the subject's Data with their path and captions.

        A picture without a caption gets the only prompt of `prompts`.  Unless there is exactly one, it gets "a photo
        of" and data.word without identifiers.
        """
        word = self.prompt(subject.word) if self.identifiers else ""
        called = self.prompts[0] if len(self.prompts) == 1 else word and PHOTO + word
        return replace(
            subject, path=self.path, source=None, word=called, templates="captions", mask=False, concept="", words=()
        )
