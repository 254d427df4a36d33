"""Contact sheets: pictures in a grid with labels.

Image.fromarray(sheet([[a, b], [c, d]], rows=["before", "after"], columns=["beach", "snow"])).save("grid.png")
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

EDGE, SIZE = 8, 13  # pixels of the margins and of the letters


def sheet(
    pictures: Sequence[Sequence[UInt8[np.ndarray, "H W 3"] | None]],
    rows: Iterable[str] = (),
    columns: Iterable[str] = (),
    scale: int = 1,
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns a grid of pictures, uint8 [height width 3], with row labels on the left and column labels on top.

    pictures: a list of rows of pictures uint8 [H W 3] of one size; None leaves a place empty.
    scale: integer factor that enlarges the pictures.
    Raises ValueError if there are no pictures or their sizes differ.
    """
    shown = [picture for row in pictures for picture in row if picture is not None]
    sizes = {picture.shape for picture in shown}
    if len(sizes) != 1:
        raise ValueError(f"pictures of sizes {sorted(sizes)}: expected one size")
    height, width = (side * scale for side in shown[0].shape[:2])
    left = [_lines(text, 110) for text in rows]
    above = [_lines(text, width) for text in columns]
    x0 = EDGE + (max(map(_width, left)) + EDGE if left else 0)
    y0 = EDGE + (max(map(_height, above)) + EDGE if above else 0)
    count = max(map(len, pictures))
    page = Image.new("RGB", (x0 + count * (width + EDGE), y0 + len(pictures) * (height + EDGE)), "white")
    draw = ImageDraw.Draw(page)
    for column, text in enumerate(above):
        draw.multiline_text((x0 + column * (width + EDGE), EDGE), text, "black", _font())
    for y, row in enumerate(pictures):
        top = y0 + y * (height + EDGE)
        if y < len(left):
            draw.multiline_text((EDGE, top + (height - _height(left[y])) // 2), left[y], "black", _font())
        for x, picture in enumerate(row):
            if picture is not None:
                large = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
                page.paste(large, (x0 + x * (width + EDGE), top))
    return np.asarray(page)


def captioned(
    pictures: Sequence[UInt8[np.ndarray, "H W 3"]], captions: Sequence[str], columns: int = 4, width: int = 192
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns pictures of any sizes in rows of `columns`, each with its caption below, uint8 [height width 3].

    width: smallest width of a caption in pixels, for narrow pictures.
    """
    wide = max(width, *(picture.shape[1] for picture in pictures))
    texts = [_lines(text, wide) for text in captions]
    rows = [range(k, min(k + columns, len(pictures))) for k in range(0, len(pictures), columns)]
    tall = [max(pictures[i].shape[0] for i in row) for row in rows]
    below = [max(_height(texts[i]) for i in row) for row in rows]
    height = sum(tall) + sum(below) + EDGE * (2 * len(rows) + 1)
    page = Image.new("RGB", (EDGE + min(columns, len(pictures)) * (wide + EDGE), height), "white")
    draw, top = ImageDraw.Draw(page), EDGE
    for row, own, words in zip(rows, tall, below, strict=True):
        for x, i in enumerate(row):
            left = EDGE + x * (wide + EDGE)
            page.paste(Image.fromarray(pictures[i]), (left, top))
            draw.multiline_text((left, top + own + EDGE // 2), texts[i], "black", _font())
        top += own + words + 2 * EDGE
    return np.asarray(page)


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(SIZE)


def _lines(text: str, width: float) -> str:
    """Returns the text with line breaks, so that no line is wider than `width` pixels unless a word is."""
    lines = [""]
    for word in str(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _width(text: str) -> int:
    return int(max(_font().getlength(line) for line in text.split("\n")))


def _height(text: str) -> int:
    return (SIZE + 4) * len(text.split("\n"))
