"""Custom Diffusion's files: pytorch_custom_diffusion_weights.safetensors, and its words as embeddings.

diffusers' pipe.unet.load_attn_procs(FOLDER, weight_name=NAME, _pipeline=pipe) needs an entry for every attention layer.
Layers without trained weights get an empty tensor here, and an empty dict in diffusers' .bin files: the loader checks
only the length.  (Without _pipeline, diffusers 0.42 reads the file and changes nothing.)
Layout: diffusers' PROCESSOR.to_k_custom_diffusion.weight [out in]; if trained, also to_q, and to_out.0 with a bias.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.formats.adapters import adapter_file, embeddings, learned_embeds, lora, lora_tensors
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.adapters.learned_embeds import beside
from sdjax.formats.storage import files
from sdjax.methods.adapter import Adapter
from sdjax.methods.chain import Chain
from sdjax.stable_diffusion import StableDiffusion

STEM, MARK = "pytorch_custom_diffusion_weights", "_custom_diffusion"
NAME = f"{STEM}.safetensors"
KINDS = {"kernel": "weight", "bias": "bias"}


class CustomDiffusion(Format):
    """Custom Diffusion's cross-attention weights as diffusers writes them; words are separate files."""

    name, called, tags, listed = "custom_diffusion", "lora", ("lora", "lyco"), "Lora hashes"
    suffixes = (".safetensors", ".bin")
    filling = (NAME, f"{STEM}.bin")

    def matches(self, file: File) -> bool:
        """Returns whether a tensor has Custom Diffusion's name."""
        return any(type(key) is str and MARK in key for key in file.keys)

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the weights of a file."""
        tensors = {name: value for name, value in file.content.items() if not name.endswith(".processor")}
        about = {name: file.metadata.get(name, "") for name in ("method", "settings")}
        about["folder"] = str(file.path.parent)
        return Adapter(edits=lora.read(tensors, sd, {}, file.path), about=about)

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether the adapter is full weights of the UNet's cross-attention, perhaps with words."""
        edits = adapter.edits.get("unet", {})
        whole = all(".attn2." in name and "whole" in getattr(e, "factors", {}) for name, e in edits.items())
        return bool(edits) and whole and set(adapter.edits) == {"unet"} and not adapter.trees and adapter.hook is None

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes the weights and, next to them, each word's learned_embeds file; returns the path of the weights."""
        about = {**(about or {}), **lora_tensors.told(adapter)}
        path, tensors = Path(folder) / NAME, {}
        for name, edit in adapter.edits["unet"].items():
            attention, projection, kind = _taken_apart(name)
            weight = np.asarray(edit.factors["whole"])
            tensors[f"{attention}.processor.{projection}.{KINDS[kind]}"] = weight
        for attention in sorted({name.partition(".attn2.")[0] for name in adapter.edits["unet"]}):
            tensors[f"{attention}.attn1.processor"] = np.zeros(0, np.float32)
        lazy = {n: files.Tensor(x.shape, x.dtype.name, lambda x=x: np.ascontiguousarray(x)) for n, x in tensors.items()}
        with files.new_file(path) as temporary:
            files.write_safetensors(temporary, lazy, {"format": "pt", **about})
        for word, place in _places(path, adapter.words).items():
            embeddings.write(place, {word: adapter.words[word]}, adapter.family, about)
        return path

    def start(
        self, adapter: Adapter, method: Any, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the file's weights and, for a Chain, the words next to it as initial values.

        Raises ValueError for weights of other layers and for another number of rows.
        """
        if not isinstance(method, Chain):
            return {**trained, "unet": _started(adapter, trained["unet"])}, frozen
        made, words = dict(trained), _words(Path(adapter.about["folder"]), adapter.family)
        for i, part in enumerate(method.parts):
            tree = made[str(i)]
            if self.name in part.formats:
                made[str(i)] = {**tree, "unet": _started(adapter, tree["unet"])}
            for word in part.words:
                wanted = {encoder: list(some.shape) for encoder, some in tree["rows"].items()}
                if {encoder: list(some.shape) for encoder, some in words.get(word, {}).items()} != wanted:
                    raise ValueError(f"no rows {wanted} of the word {word!r} lie beside it")
                made[str(i)] = {**tree, "rows": jax.tree.map(jnp.asarray, words[word])}
        return made, frozen

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on the use of weights and words here and in diffusers."""
        rows = list(_places(path, adapter.words).values())
        word = next(iter(adapter.words), "a photo")
        given = " ".join(f'--adapter "{one}"' for one in (path, *rows))
        lines = [f'here       sdjax text2img --model {model} {given} --prompt "a photo of {word}"']
        lines.append(
            f'diffusers  pipe.unet.load_attn_procs("{path.parent}", weight_name="{path.name}", _pipeline=pipe)'
        )
        return lines + [f'           pipe.load_textual_inversion("{one}")' for one in rows]


def _taken_apart(name):
    """Returns (attention layer, diffusers' name of the projection, name of the leaf) of a weight's dotted name."""
    path, _, kind = name.rpartition(".")
    attention, _, projection = path.partition(".attn2.")
    first, _, number = projection.partition(".")
    return f"{attention}.attn2", f"{first}{MARK}{number and f'.{number}'}", kind


def _places(path, words):
    """Returns {word: its file} next to the weights."""
    place = path.with_name(learned_embeds.NAME)
    return {word: place for word in words} if len(words) == 1 else beside(place, words)


def _words(folder, family):
    """Returns {word: {text encoder: rows}} of the learned_embeds files in a folder."""
    found = {}
    for path in sorted(folder.glob(f"{Path(learned_embeds.NAME).stem}*.safetensors")):
        found |= embeddings.read(adapter_file.of(path).content, path, family)
    return found


def _started(adapter, tree):
    """Returns the trained tree with an adapter's weights."""
    found, wanted = adapter.edits["unet"], trees.flatten(tree)
    if found.keys() != wanted.keys():
        raise ValueError(f"its weights are not this method's: {trees.listing(sorted(found.keys() ^ wanted.keys()))}")
    flat = {name: jnp.asarray(np.asarray(edit.factors["whole"], np.float32).T) for name, edit in found.items()}
    return trees.unflatten(flat, tree)
