"""Finds the columns of pictures, captions, masks and conditions in a table, and reads the bytes of a cell.

A picture's cell is binary, or a struct with "bytes" as Hugging Face's `Image` feature writes it.  A struct's "path" is
never opened, so a data set cannot point to other files.  A caption's cell is a text or a list of texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sdjax.data import tables
from sdjax.settings import SettingError

PICTURE = ("image", "picture", "img", "jpg", "png", "webp", "image_bytes", "bytes")
CAPTION = ("text", "caption", "captions", "prompt", "txt")
MASK = ("mask",)
CONDITION = ("conditioning_image", "condition", "control")


@dataclass(frozen=True)
class Columns:
    """Names of columns; "" for a missing one."""

    picture: str
    caption: str
    mask: str
    condition: str


def find(schema: Any, path: str, picture: str = "", caption: str = "") -> Columns:
    """Returns the Columns of a pyarrow schema.  picture, caption: names that the user gives; "" finds them.

    Raises SettingError for a column that is missing or of the wrong type, and for a table without a picture column.
    """
    held = [field.name for field in schema if _holds_bytes(field.type)]
    said = [field.name for field in schema if _holds_text(field.type)]
    for name, wanted, there in (("image_column", picture, held), ("caption_column", caption, said)):
        if wanted and wanted not in there:
            raise SettingError(name, wanted, f"one of {', '.join(there) or 'none'}, the fitting columns of {path}")
    mask, condition = _first(MASK, held), _first(CONDITION, held)
    free = [name for name in held if name not in (mask, condition)]
    found = picture or _first(PICTURE, free) or (free[0] if len(free) == 1 else "")
    if not found:
        names = ", ".join(free) or f"none of {', '.join(schema.names)} holds bytes"
        raise SettingError("image_column", picture, f"the column of pictures in {path}: {names}")
    return Columns(found, caption or _first(CAPTION, said), mask, condition)


def leaves(schema: Any, columns: Columns) -> list[str]:
    """Returns parquet's names of the bytes of pictures, masks and conditions, such as "image.bytes"."""
    names = [columns.picture, columns.mask, columns.condition]
    return [f"{name}.bytes" if _is_struct(schema.field(name).type) else name for name in names if name]


def cell(column: Any, row: int) -> bytes | None:
    """Returns the bytes in a row of a pyarrow column; None for an empty cell."""
    value = column[row].as_py()
    return value.get("bytes") if isinstance(value, dict) else value


def same(schema: Any, columns: Columns, path: str) -> None:
    """Raises ValueError naming a file if it lacks a column of the first file, or the column has the wrong type."""
    for field in fields(columns):
        name = getattr(columns, field.name)
        fits = _holds_text if field.name == "caption" else _holds_bytes
        if name and (name not in schema.names or not fits(schema.field(name).type)):
            raise ValueError(f"{path}: no column {name!r} as in the first file")


def _first(names: Sequence[str], there: Sequence[str]) -> str:
    lower = {name.lower(): name for name in there}
    return next((lower[name] for name in names if name in lower), "")


def _is_struct(kind):
    tables.arrow()
    from pyarrow import types

    return types.is_struct(kind)


def _holds_bytes(kind):
    tables.arrow()
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_text(kind):
    tables.arrow()
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind)
