"""Prompt styles: a file styles.csv in the server's folder, as A1111 writes it.

    name,prompt,negative_prompt
    ink,"an ink drawing of {prompt}, fine lines",colour

Source: AUTOMATIC1111's stable-diffusion-webui 1.10, modules/styles.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdjax.service.place import Place

FILE = "styles.csv"
MOST = 1 << 20  # bytes
HERE = "{prompt}"


@dataclass(frozen=True)
class Style:
    """Texts around a prompt and a negative prompt; "{prompt}" in a text stands for the given one."""

    name: str
    prompt: str = ""
    negative_prompt: str = ""


def of(place: Place) -> dict[str, Style]:
    """Returns {name: Style} of a place's file, {} if there is none; read again at every call."""
    return read(place.root / FILE)


def read(path: Path) -> dict[str, Style]:
    """Returns {name: Style} of a file; rows without a name, and A1111's dividers (---), are left out.

    Raises ValueError for a file that is not such a table.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > MOST:
        raise ValueError(f"{path.name}: {path.stat().st_size} bytes; expected at most {MOST}")
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name}: {error}; expected a table in UTF-8") from None
    if rows and "name" not in rows[0]:
        raise ValueError(f"{path.name}: no column name; expected name, prompt, negative_prompt")
    made = [_style(row) for row in rows]
    return {one.name: one for one in made if one.name and not one.name.startswith("---")}


def _style(row: Mapping[str, str | None]) -> Style:
    prompt = row.get("prompt") or row.get("text")  # `text` before A1111 1.0
    return Style((row["name"] or "").strip(), prompt or "", row.get("negative_prompt") or "")


def applied(styles: Sequence[Style], prompt: str, negative_prompt: str) -> tuple[str, str]:
    """Returns (prompt, negative prompt) with styles, one after the other."""
    for one in styles:
        prompt, negative_prompt = _around(one.prompt, prompt), _around(one.negative_prompt, negative_prompt)
    return prompt, negative_prompt


def _around(style: str, text: str) -> str:
    """Returns a text in a style's: in place of {prompt}, else before it with a comma."""
    if HERE in style:
        return style.replace(HERE, text)
    return ", ".join(filter(None, (text.strip(), style.strip())))
