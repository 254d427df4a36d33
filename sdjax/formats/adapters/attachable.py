"""Adapter files for attaching: detects the kind of a file from its content and reads its adapter.

path = locate("ink")                         # a file, or the file in a folder from diffusers or PEFT
kind(path).name                              # "kohya"
adapter = read(path, sd)                     # Adapter(edits, words, hook, conditioner)
"""

import dataclasses
import functools
import pathlib

from sdjax.formats.adapters import adapter_file
from sdjax.formats.adapters.format import Format
from sdjax.formats.adapters.kinds import given, kind_of, locate, recognised
from sdjax.methods.adapter import Adapter
from sdjax.runtime.guard import named
from sdjax.stable_diffusion import StableDiffusion

__all__ = ["given", "kind", "locate", "read"]


def read(path: pathlib.Path, sd: StableDiffusion, word: str | None = None) -> Adapter:
    """Returns the Adapter of a file for a model.

    word: replaces an embedding's own word.
    Raises ValueError, or Pillow's OSError, in one line that names the file, for any unusable content.
    """
    with named(path):
        file = adapter_file.of(path)
        kind = kind_of(file)
        if not kind.called:
            raise ValueError(f"{path}: of the kind {kind.name}, from which only training starts, as init=")
        adapter = dataclasses.replace(kind.acts(kind.read(file, sd), sd), family=sd.family)
        adapter = adapter if word is None else _renamed(adapter, word, kind, path)
        if not all(name.strip() for name in adapter.words):
            raise ValueError(f"{path}: an embedding without a word; give one")
        return adapter


def _renamed(adapter: Adapter, word: str, kind: Format, path: pathlib.Path) -> Adapter:
    """Returns an embedding under another word."""
    if not adapter.only_words:
        raise ValueError(f"{path}: word={word!r}: only embeddings have a word, and this is of the kind {kind.called}")
    if len(adapter.words) != 1:
        raise ValueError(f"{path}: word={word!r}: the file has {len(adapter.words)} words, {', '.join(adapter.words)}")
    return dataclasses.replace(adapter, words={word: next(iter(adapter.words.values()))})


def kind(path: pathlib.Path) -> Format | None:
    """Returns the kind of a file, or None for an unknown one; reads only the header of safetensors.

    Raises ValueError or OSError in one line, naming the file, if an error prevents the detection.
    """
    about = path.stat()
    with named(path):
        return _known_kind(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=1024)
def _known_kind(path, time, size):
    return recognised(adapter_file.of(path))
