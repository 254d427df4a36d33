"""Turns every error of a reader into one line that names the file."""

import contextlib
import pathlib
from collections.abc import Iterator

from sdjax.settings import SettingError

LONGEST = 400  # letters of a message


@contextlib.contextmanager
def named(path: str | pathlib.Path, trouble: str = "cannot be read") -> Iterator[None]:
    """Turns what the block raises into a ValueError of one line, "PATH: REASON", but for ValueErrors after `trouble`.

    path: of the file that the block reads.  A line that names it already stays as it is, an OSError too.
    """
    try:
        yield
    except SettingError as error:  # it keeps its setting
        why = error.why if str(path) in error.why else ": ".join(filter(None, (str(path), error.why)))
        raise SettingError(error.name, error.value, error.expected, why) from None
    except Exception as error:  # of our readers, of Pillow, safetensors, numpy and JAX
        line, ours = " ".join(str(error).split()) or type(error).__name__, isinstance(error, ValueError)
        if isinstance(error, ValueError | OSError) and str(path) in line and line == str(error):
            raise
        line = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
        prefix = "" if str(path) in line else f"{path}: " if ours else f"{path}: {trouble}: "
        raise ValueError(prefix + line) from error
