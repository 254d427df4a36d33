"""Errors in one line; `named` turns every error of a reader into one that names the file."""

import contextlib
import pathlib
from collections.abc import Iterator

from sdjax.settings import SettingError

LONGEST = 400  # letters of a message


def line(error: BaseException) -> str:
    """Returns an error's message on one line, or its kind without a message."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its kind without a message."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextlib.contextmanager
def named(path: str | pathlib.Path, trouble: str = "cannot be read") -> Iterator[None]:
    """Turns the block's errors into ValueErrors of one line: "PATH: REASON", or "PATH: TROUBLE: REASON".

    path: the file that the block reads.  ValueErrors get the short form.  A message that already names the path does
    not get it again; a ValueError or OSError with such a message on one line stays the same error.
    """
    try:
        yield
    except SettingError as error:  # keeps its setting
        why = error.why if str(path) in error.why else ": ".join(filter(None, (str(path), error.why)))
        raise SettingError(error.name, error.value, error.expected, why) from None
    except Exception as error:  # from our readers, Pillow, safetensors, numpy and JAX
        said, ours = line(error), isinstance(error, ValueError)
        if isinstance(error, ValueError | OSError) and str(path) in said and said == str(error):
            raise
        said = said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."
        prefix = "" if str(path) in said else f"{path}: " if ours else f"{path}: {trouble}: "
        raise ValueError(prefix + said) from error
