"""Several methods at once: pivotal tuning (TextualInversion, Lora), E4T's tuning (E4T, Full).

Chain((E4T(), Full(("unet",))))
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import Array

from sdjax import trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.full import Full
from sdjax.methods.method import Method, about
from sdjax.settings import SettingError, prefixed
from sdjax.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Chain(Method):
    """Trains several methods together: splits them in order, joins them in reverse.

    A method with its own loss or previews cannot be a part.
    """

    parts: tuple = ()

    def __post_init__(self):
        takes = [isinstance(part, Full) for part in self.parts]
        if any(takes[:-1]):
            raise ValueError("method.parts: Full takes weights away, so it comes last and only once in a Chain")
        if sum("hypernetwork" in part.formats for part in self.parts) > 1:
            raise ValueError("method.parts: a file holds one hypernetwork; expected one such part")
        words = [" ".join(word.lower().split()) for word in self.words]
        if twice := sorted({word for word in words if words.count(word) > 1}):
            raise ValueError(f"method.parts: two parts train the word {twice[0]!r}; expected one")
        for part in self.parts:
            for what in ("loss", "preview"):
                if getattr(part, what) is not None:
                    raise ValueError(f"method.parts: {type(part).__name__} has a {what} of its own; it trains alone")

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({"0": trained of the first part, ...}, the rest of sd).

        Raises SettingError for two parts that edit one weight, unless Full makes a whole model of all.
        """
        trained = {}
        for i, part in enumerate(self.parts):
            with prefixed(f"parts.{i}"):
                trained[str(i)], sd = part.split(sd, _folded(key, i))
        if not any(isinstance(part, Full) for part in self.parts):
            self._check_apart(trained)
        return trained, sd

    def _check_apart(self, trained):
        """Raises SettingError for two parts that edit one weight."""
        edited = {i: part.edited(trained[str(i)]) for i, part in enumerate(self.parts)}
        for i, j in itertools.combinations(edited, 2):
            if both := sorted(edited[i] & edited[j]):
                which, names = trees.listing(both, 1), [type(self.parts[k]).__name__ for k in (i, j)]
                said = f"{names[0]} (parts.{i}) and {names[1]} (parts.{j}) both change {which}"
                raise SettingError("parts", names, "parts that change different weights", said)

    def edited(self, trained: Any) -> set[str]:
        """Returns the names of the weights that the parts edit."""
        return {name for i, part in enumerate(self.parts) for name in part.edited(trained[str(i)])}

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd with every part joined, the last first."""
        for i, part in reversed(list(enumerate(self.parts))):
            frozen = part.join(frozen, trained[str(i)], _folded(key, i))
        return frozen

    def before(self, frozen: StableDiffusion) -> StableDiffusion:
        """Returns sd before any part trained."""
        for part in reversed(self.parts):
            frozen = part.before(frozen)
        return frozen

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the parts' adapters as one.

        None if a part is a whole model and no other part goes into its folder, or if one adapter cannot hold them all.

        Example: E4T's encoder goes into the folder of the model whose UNet Full trained.
        """
        found = []
        for i, part in reversed(list(enumerate(self.parts))):
            found.insert(0, part.adapter(frozen, trained[str(i)]))
            frozen = part.join(frozen, trained[str(i)]) if i else frozen
        for i, one in enumerate(found):
            if one is not None and one.model is not None:
                model = one.model
                for j in reversed(range(i)):
                    model = self.parts[j].join(model, trained[str(j)])
                return replace(one, model=model)
        if None in found:
            return None
        return super().adapter(frozen, trained) if any(one.trees for one in found) else _together(found, about(self))

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of its parts."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.formats))

    @property
    def words(self) -> tuple[str, ...]:
        """The placeholders that its parts train."""
        return tuple(word for part in self.parts for word in part.words)

    @property
    def unwanted(self) -> tuple[str, ...]:
        """The placeholders for the negative prompt."""
        return tuple(word for part in self.parts for word in part.unwanted)

    @property
    def pixels(self) -> bool:
        """Whether a part needs pixels."""
        return any(part.pixels for part in self.parts)

    @property
    def condition(self) -> bool:
        """Whether a part reads condition pictures."""
        return any(part.condition for part in self.parts)

    @property
    def whole_batch(self) -> bool:
        """Whether a part needs all rows at once."""
        return any(part.whole_batch for part in self.parts)

    @property
    def look(self) -> Callable | None:
        """A function that gives the run's picture to every part that reads it, or None."""
        return self._look if any(part.look is not None for part in self.parts) else None

    @property
    def project(self) -> Callable | None:
        """A function that applies every part's bound, or None."""
        return self._project if any(part.project is not None for part in self.parts) else None

    @property
    def measure(self) -> Callable | None:
        """A function that returns every part's measurements, or None."""
        return self._measure if any(part.measure is not None for part in self.parts) else None

    @property
    def finish(self) -> Callable | None:
        """A function that finishes every part after the last step, or None."""
        return self._finish if any(part.finish is not None for part in self.parts) else None

    def _look(self, frozen, trained, pixels):
        for i, part in enumerate(self.parts):
            frozen = frozen if part.look is None else part.look(frozen, trained[str(i)], pixels)
        return frozen

    def _project(self, trained):
        return {
            str(i): trained[str(i)] if part.project is None else part.project(trained[str(i)])
            for i, part in enumerate(self.parts)
        }

    def _measure(self, frozen, trained):
        told = [part.measure(frozen, trained[str(i)]) for i, part in enumerate(self.parts) if part.measure is not None]
        return {name: value for one in told for name, value in one.items()}

    def _finish(self, frozen, trained, data):
        trained = dict(trained)
        for i, part in enumerate(self.parts):
            if part.finish is not None:
                frozen, trained[str(i)] = part.finish(frozen, trained[str(i)], data)
        return frozen, trained


def _folded(key, i):
    """Returns the key, or the keys per example, of part i."""
    if key is None or not key.ndim:
        return None if key is None else jax.random.fold_in(key, i)
    return jax.vmap(lambda one: jax.random.fold_in(one, i))(key)


def _together(adapters, about):
    """Returns several adapters as one; None if it cannot hold them, with one edit per weight and one hook."""
    things = [thing for one in adapters for thing in _things(one)]
    if len(things) != len(set(things)):
        return None
    first = adapters[0]
    for other in adapters[1:]:
        first = replace(
            first,
            edits={
                part: {**first.edits.get(part, {}), **other.edits.get(part, {})} for part in first.edits | other.edits
            },
            words={**first.words, **other.words},
            hook=other.hook if first.hook is None else first.hook,
            conditioner=other.conditioner if first.conditioner is None else first.conditioner,
            own={**first.own, **other.own},
        )
    return replace(first, about=about)


def _things(adapter):
    """Yields a name of everything that an adapter holds."""
    yield from ((part, name) for part, edits in adapter.edits.items() for name in edits)
    yield from (("words", word) for word in adapter.words)
    yield from (("own", name) for name in adapter.own)
    yield from ((kind, "") for kind in ("hook", "conditioner") if getattr(adapter, kind) is not None)
