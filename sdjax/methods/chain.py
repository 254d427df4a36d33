"""Several methods at once: pivotal tuning (TextualInversion, Lora), E4T's tuning (E4T, Full).

Chain((E4T(), Full(("unet",))))
"""

from contextlib import contextmanager
from dataclasses import dataclass

import jax

from sdjax.methods.full import Full


@dataclass(frozen=True)
class Chain:
    """Splits its parts in order and joins them in reverse, so that the first part sees what the later ones put back."""

    parts: tuple = ()

    def __post_init__(self):
        takes = [isinstance(part, Full) for part in self.parts]
        if any(takes[:-1]):
            raise ValueError("method.parts: Full takes weights away, so it comes last and only once in a Chain")
        for part in self.parts:
            if hasattr(part, "loss"):
                raise ValueError(f"method.parts: {type(part).__name__} has a loss of its own; it trains alone")

    def split(self, sd, key):
        """Returns ({"0": trained of the first part, ...}, what is left of sd).

        Raises the parts' own ValueErrors, with the setting's name as a Chain has it: method.parts.0.domain.
        """
        trained = {}
        for i, part in enumerate(self.parts):
            with named_part(i):
                trained[str(i)], sd = part.split(sd, jax.random.fold_in(key, i))
        return trained, sd

    def join(self, frozen, trained, key=None):
        """Returns sd with every part joined, the last first."""
        for i, part in reversed(list(enumerate(self.parts))):
            frozen = part.join(frozen, trained[str(i)], None if key is None else jax.random.fold_in(key, i))
        return frozen

    def look(self, frozen, trained, pixels):
        """Returns frozen that every part which looks at a run's one picture has seen; pixels [H W 3] in [-1, 1]."""
        for i, part in enumerate(self.parts):
            frozen = part.look(frozen, trained[str(i)], pixels) if hasattr(part, "look") else frozen
        return frozen


@contextmanager
def named_part(i):
    """Gives a setting in a ValueError of part i its name in the Chain: method.domain is method.parts.i.domain."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("method.", f"method.parts.{i}.", 1)) from error
