"""Reads a file of preview prompts, one per line, in kohya's syntax.

    # comments and empty lines are skipped
    a photo of [name] on the beach --n blurry --w 512 --h 768 --d 42 --l 7.5 --s 28

--n negative prompt, --w --h width and height, --d seed, --l guidance, --s steps, --ss sampler, --cn a ControlNet's
condition, a picture file; "[name]" is the subject's word.  Prompts have A1111's weights, (cat:1.2), and any length.
The defaults are the model's size, 20 steps, and the line's number from 0 as seed.

Source: kohya-ss/sd-scripts, docs/train_network.md and library/train_util.py (sample prompts).
"""

import re
from pathlib import Path
from typing import Any

from sdjax.data.prompts import NAME
from sdjax.images import reading
from sdjax.sampling.fields import make
from sdjax.sampling.settings import TextToImage
from sdjax.settings import SettingError

CONTROL = "control_image"
OPTIONS = {  # kohya's letter: our setting and its type
    "n": ("negative_prompt", str), "w": ("width", int), "h": ("height", int), "d": ("seed", int),
    "l": ("guidance", float), "s": ("steps", int), "ss": ("sampler", str), "cn": (CONTROL, str),
}  # fmt: skip
OPTION = re.compile(r"\s--(\w+)(?=\s|$)")
STEPS = 20


def read(path: str | Path, word: str = "") -> list[dict[str, Any]]:
    """Returns {name: value} of sampling.settings.TextToImage for each line; CONTROL is a picture uint8 [H W 3].

    Raises ValueError naming file and line of an unreadable line or picture.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or "").lower() if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingError("prompts_file", str(path), "a text file with a prompt on each line", why) from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise SettingError("prompts_file", str(path), "a prompt on each line", "it has none")
    found = []
    for k, (number, line) in enumerate(lines):
        try:
            found.append({"seed": k, "steps": STEPS, "grammar": "a1111", **_settings(line, word)})
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return found


def _settings(line, word):
    """Returns the settings in a line."""
    prompt, *parts = OPTION.split(f" {line} ")
    given: dict[str, Any] = {"prompt": prompt.strip().replace(NAME, word)}
    for letter, text in zip(parts[::2], parts[1::2], strict=True):
        letter = letter.lower()  # as kohya reads them
        if letter not in OPTIONS:
            raise ValueError(f"--{letter}: expected one of {', '.join(f'--{name}' for name in OPTIONS)}")
        name, kind = OPTIONS[letter]
        try:
            given[name] = kind(text.strip())
        except ValueError:
            raise ValueError(f"--{letter} {text.strip()}: expected a number") from None
    sides = given.pop("width", None), given.pop("height", None)
    if any(sides):
        width, height = (side or other for side, other in (sides, sides[::-1]))
        given["size"] = f"{width}x{height}"
    control = {CONTROL: reading.picture(given.pop(CONTROL))} if CONTROL in given else {}
    made = make(TextToImage, given)
    return {name: getattr(made, name) for name in given} | control
