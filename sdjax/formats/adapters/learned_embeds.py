"""Files of textual inversion: learned_embeds.safetensors, diffusers' name."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax.formats.adapters import embeddings
from sdjax.formats.adapters.about import a1111_keys
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.storage import hashes
from sdjax.methods.adapter import Adapter
from sdjax.stable_diffusion import StableDiffusion

NAME = "learned_embeds.safetensors"
ENDINGS = {"diffusers": ".safetensors", "diffusers-bin": ".bin", "a1111": ".pt"}  # by layout


class LearnedEmbeds(Format):
    """Embeddings of learned words: reads every layout, writes diffusers'.

    Words are {word: {text encoder: rows [n C]}}; see embeddings.py.
    """

    name, called, listed = "embedding", "embedding", "TI hashes"
    suffixes = (".safetensors", ".pt", ".ckpt", ".bin", ".png")
    filling = (NAME, "learned_embeds.bin")
    last = True  # one tensor of any name may be an embedding

    def matches(self, file: File) -> bool:
        """Returns whether a file may be an embedding: an array, few tensors, or a picture with an embedding's text."""
        if file.picture:
            return embeddings.from_picture(file.path) is not None
        if file.path.is_dir() or file.metadata.get("format", "").startswith("sdjax."):
            return False  # one of our formats names itself
        return isinstance(file.content, np.ndarray) if not file.keys else embeddings.recognised(file.keys)

    def digest(self, path: Path) -> str:
        """Returns AutoV2, 10 hex digits of the file's SHA-256."""
        return hashes.autov2(path)

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether the adapter is words and nothing else."""
        return adapter.only_words

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the words of a file, with A1111's metadata in about["file"]."""
        state = embeddings.from_picture(file.path) if file.picture else file.content
        words = embeddings.read(state, file.path, sd.family, file.metadata.get(embeddings.WORD))
        known = isinstance(state, dict) and "string_to_param" in state
        said = (
            {name: state[name] for name in embeddings.SAID if isinstance(state.get(name), str | int)} if known else {}
        )
        return Adapter(words=words, about={"file": said} if said else {})

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes learned_embeds.safetensors, or one file per word; returns the path of the first.

        The method's `layout` chooses another file: learned_embeds.bin, or A1111's WORD.pt.
        """
        who = {name: adapter.about[name] for name in ("method", "settings") if name in adapter.about}
        about = {**(about or {}), **{name: x if isinstance(x, str) else json.dumps(x) for name, x in who.items()}}
        layout = who.get("settings", {}).get("layout", "diffusers")
        path = Path(folder) / f"{Path(NAME).stem}{ENDINGS[layout]}"
        named = layout == "a1111" or len(adapter.family.rows) > 1  # then tools take the file's name for the word
        one = len(adapter.words) == 1 and not named
        places = dict.fromkeys(adapter.words, path) if one else beside(path, adapter.words, alone=named)
        told = about
        if layout == "a1111":
            told = {"step": 0, **a1111_keys(about), **adapter.about.get("file", {})}
        held = {place: {word: adapter.words[word]} for word, place in places.items()}
        return [embeddings.write(place, words, adapter.family, told) for place, words in held.items()][0]

    def start(
        self, adapter: Adapter, method: Any, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the rows of the file's only word; the names of the words may differ."""
        if len(adapter.words) != 1:
            raise ValueError(f"holds {len(adapter.words)} words; expected an embedding of one")
        (rows,) = adapter.words.values()
        both = rows, trained["rows"]
        has, wants = (", ".join(f"{name} {some.shape}" for name, some in tree.items()) for tree in both)
        if has != wants:
            raise ValueError(f"rows {has} where this method has {wants}")
        return {**trained, "rows": {encoder: jnp.asarray(some) for encoder, some in rows.items()}}, frozen

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on the use of the word here, in diffusers and in A1111."""
        word, rows = next(iter(adapter.words.items()))
        negative = adapter.about.get("settings", {}).get("negative")
        said = f'--negative-prompt "{word}" --prompt TEXT' if negative else f'--prompt "a photo of {word}"'
        adapter_of = f'"{word}={path}"' if path.suffix == ".pt" else str(path)
        there = [f'diffusers  pipe.load_textual_inversion("{path}"), then prompt {word}']
        if len(rows) > 1:
            there = [_load(path, word, one, adapter.family) for one in rows]
        return [
            f"here       python -m sdjax text2img --model {model} --adapter {adapter_of} {said}",
            *there,
            "A1111      copy it to embeddings/ under a name of your choice: the word there is the file's name",
        ]


def _load(path, word, encoder, family):
    """Returns a line on how diffusers loads the rows of one of several text encoders."""
    parts = f"tokenizer=pipe.{family.tokenizers[encoder]}, text_encoder=pipe.{encoder}"
    return f'diffusers  pipe.load_textual_inversion(load_file("{path}")["{family.rows[encoder]}"], "{word}", {parts})'


def beside(path: Path, words: Iterable[str], alone: bool = False) -> dict[str, Path]:
    """Returns {word: its own file next to `path`}, such as cat-s.safetensors for "s" and cat.safetensors.

    alone: name the file only by the word, since A1111 takes a file's name for the word.
    """
    found = {}
    for i, word in enumerate(words):
        letters = "".join(letter for letter in word if letter.isalnum() or letter in "-_")
        stem = letters or f"word{i}" if alone else f"{path.stem}-{letters or i}"
        place = path.with_name(f"{stem}{path.suffix}")
        found[word] = place.with_stem(f"{place.stem}-{i}") if place in found.values() else place
    return found
