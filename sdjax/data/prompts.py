"""Prompts for training: random templates around a subject's word or a picture's caption.

    prompts = make("object", word="<cat>")
    prompts("", np.random.default_rng(0))                  # "a close-up photo of the <cat>"
    make("captions")("a cat on a sofa", random)            # the caption itself

In a template, the word replaces "[name]" and the caption "[filewords]", as in the web UI's template files.  A caption
may also contain "[name]".
Source: Textual Inversion, Gal et al. 2022, code release (object, style); mkshing/e4t-diffusion (normal, face, art).
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAME, CAPTION = "[name]", "[filewords]"
PHOTO = f"a photo of {NAME}"
MAX_BYTES = 1 << 16  # most bytes of a template file


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.split("|"))


OBJECT = _lines(
    "a photo of a [name] | a rendering of a [name] | a cropped photo of the [name] | the photo of a [name] |"
    "a photo of a clean [name] | a photo of a dirty [name] | a dark photo of the [name] | a photo of my [name] |"
    "a photo of the cool [name] | a close-up photo of a [name] | a bright photo of the [name] |"
    "a cropped photo of a [name] | a photo of the [name] | a good photo of the [name] | a photo of one [name] |"
    "a close-up photo of the [name] | a rendition of the [name] | a photo of the clean [name] |"
    "a rendition of a [name] | a photo of a nice [name] | a good photo of a [name] | a photo of the nice [name] |"
    "a photo of the small [name] | a photo of the weird [name] | a photo of the large [name] |"
    "a photo of a cool [name] | a photo of a small [name]"
)
_PAINTINGS = _lines(
    "a painting | a rendering | a cropped painting | the painting | a clean painting | a dirty painting |"
    "a dark painting | a picture | a cool painting | a close-up painting | a bright painting | a cropped painting |"
    "a good painting | a close-up painting | a rendition | a nice painting | a small painting | a weird painting |"
    "a large painting"
)
STYLE = tuple(f"{painting} in the style of [name]" for painting in _PAINTINGS)
NORMAL = _lines(
    "a photo of [name] | the photo of [name] | a photo of a [name] | a photo of the [name] | a photo of one [name] |"
    "a close-up photo of the [name] | a bright photo of the [name] | a photo of a nice [name] |"
    "a good photo of [name] | a photo of a cool [name]"
)
FACE = NORMAL + _lines(
    "a portrait of [name] | the portrait of [name] | a portrait photo of [name] | portrait of [name] |"
    "portrait of the [name] | photo realistic portrait of [name]"
)
ART = NORMAL + _lines("art of [name] | art by [name]")
TRIGGER = (f"{NAME}, {CAPTION}",)  # PHOTO for a picture without a caption
TEMPLATES = {
    "captions": (CAPTION,),
    "trigger": TRIGGER,
    "none": ("",),
    "object": OBJECT,
    "style": STYLE,
    "normal": NORMAL,
    "face": FACE,
    "art": ART,
}
# A word keeps its article only if the template has none in that place: "a photo of [name]", "art by [name]".
_AFTER_ARTICLE = re.compile(r"(?<!\bof)(?<!\bby)(?<=\w) \[name\]")


@dataclass(frozen=True)
class Prompts:
    """prompts(caption, random) -> str: one template, drawn evenly and filled."""

    templates: tuple[str, ...]
    word: str = ""

    def __call__(self, caption: str, random: np.random.Generator) -> str:
        template = self.templates[random.integers(len(self.templates))]
        if not caption and template in TRIGGER:
            template = PHOTO
        return fill(template, self.word, caption or self.word)


def make(templates: str = "captions", word: str = "") -> Prompts:
    """Returns the Prompts of a list's name ("captions", "none", "object", "style", ...) or a template file.

    Raises ValueError for an unknown list, a file that is missing, too long or has neither "[name]" nor "[filewords]",
    and for templates that need a word when `word` is empty.
    """
    lines = TEMPLATES[templates] if templates in TEMPLATES else read(templates)
    if not word and any(NAME in line for line in lines):
        raise ValueError(f"data.word='': data.templates={templates!r} call the subject by a word; give one")
    return Prompts(lines, word)


def read(path: str | Path) -> tuple[str, ...]:
    """Returns the templates of a text file, one per line; empty lines are skipped."""
    path, shown = Path(path), f"data.templates={str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{shown}: expected {', '.join(TEMPLATES)} or a text file with one template on each line")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{shown}: longer than {MAX_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{shown}: not UTF-8 text") from None
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not any(NAME in line or CAPTION in line for line in lines):
        raise ValueError(f"{shown}: no line holds {NAME} or {CAPTION}")
    return lines


def fill(template: str, word: str, caption: str = "") -> str:
    """Returns the template with word and caption in place; "a photo of a [name]" with "a cat" is "a photo of a cat"."""
    text = template.replace(CAPTION, caption)
    bare = re.sub(r"^(a|an|the) (?=\S)", "", word)
    return _AFTER_ARTICLE.sub(lambda _: " " + bare, text).replace(NAME, word)
