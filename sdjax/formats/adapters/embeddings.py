"""Textual inversions: rows of the token table, in the layouts of all tools.

read({"<cat-toy>": rows}, Path("learned_embeds.safetensors"), sd.family)  # {"<cat-toy>": {"text_encoder": [n C]}}

{"string_to_param": {"*": rows}, ...}       A1111 and the original; the word is the file's name
{"<word>": rows}                            diffusers; rows [n C] or [C]
{"emb_params": rows}                        sd-scripts, invoke-training; the word is the file's name
{"emp_params": rows}                        OneTrainer; the word is the file's name
{"clip_l": rows, "clip_g": rows}            SDXL's two text encoders, of SD 1 clip_l alone; the word is the file's name
{"bundle_emb.WORD.string_to_param.*": rows} beside the tensors of a LoRA; also "bundle_emb.WORD.clip_l" and clip_g
a bare array                                the word is the file's name
a picture (PNG) with the text sd-ti-embedding, or the same in its pixels, A1111's; the word is the file's name
"""

import base64
import json
import pathlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Float32

from sdjax import trees
from sdjax.families.family import Family
from sdjax.formats.storage import files, pickle_writer
from sdjax.stable_diffusion import TOKENS, StableDiffusion

UNNAMED = ("*", "emb_params", "emp_params")  # keys that are not the word
CLIPS = ("clip_l", "clip_g")  # rows of SDXL's text encoders; a family's `rows` lists a model's
WORD = "word"  # key of the word in our headers, for files whose tensors do not name it
STAR = 265  # CLIP's token "*", which A1111's files use for every embedding
SAID = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")  # A1111's metadata of an embedding
BUNDLED = "bundle_emb."
ENDS = (".string_to_param.*", ".emb_params")
FEW = 4  # most tensors in an unknown file that may still be an embedding
BLOCK = 64  # the token table grows by this many rows, so that few sizes are compiled
Words = dict[str, dict[str, Float32[np.ndarray, "n C"]]]  # {word: {text encoder: rows}}


def recognised(keys: Collection[Any]) -> bool:
    """Returns whether keys belong to an embedding's file, or there are at most FEW, so that it may be one."""
    return "string_to_param" in keys or len(keys) <= FEW or all(str(key).startswith(BUNDLED) for key in keys)


def read(state: Any, path: pathlib.Path, family: Family, word: str | None = None) -> Words:
    """Returns {word: {text encoder: float32 rows [n C]}} from a file's content.

    family: the model's family; rows without a text encoder's name are for the first one.
    word: the word for rows without one; None for the file's name.
    Raises ValueError for a file without an embedding, or with one for other text encoders.
    """
    if isinstance(state, np.ndarray):
        state = {"*": state}
    if not isinstance(state, dict) or not all(type(key) is str for key in state):
        raise ValueError(f"{path}: holds no tensors by name")
    words, _ = bundled(state, path, family)
    if words:
        return words
    word = path.stem if word is None else word
    tensors = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
    if tensors and tensors.keys() <= set(CLIPS):
        return {word: {_encoder(key, family, path): _rows(rows, path) for key, rows in tensors.items()}}
    key, rows = _only(state, path)
    return {word if key in UNNAMED else key: {_encoder("", family, path): _rows(rows, path)}}


def _encoder(key, family, path):
    """Returns the text encoder for a tensor's key; the first one for ""."""
    found = next((encoder for encoder, own in family.rows.items() if key in (own, "")), None)
    if found is None:
        there = ", ".join(family.rows.values())
        raise ValueError(f"{path}: an embedding{key and f' for SDXL ({key})'}; this model reads {there or 'no words'}")
    return found


def _only(state, path):
    """Returns (key, rows) of a file's only tensor."""
    if "string_to_param" in state:
        state = state["string_to_param"]
        if not isinstance(state, dict) or len(state) != 1 or not isinstance(next(iter(state.values())), np.ndarray):
            raise ValueError(f"{path}: string_to_param: one word's rows are expected")
        return "*", next(iter(state.values()))
    state = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
    if "emp_params_out" in state:
        raise ValueError(f"{path}: holds emp_params_out, rows behind the text encoder; only rows before it are read")
    if len(state) != 1:
        raise ValueError(f"{path}: no LoRA or hypernetwork, and an embedding file holds one tensor, not {len(state)}")
    return next(iter(state.items()))


def bundled(tensors: Mapping[str, Any], path: pathlib.Path, family: Family) -> tuple[Words, dict[str, Any]]:
    """Returns ({word: {text encoder: rows}} of embeddings bundled with a LoRA, the other tensors)."""
    ends, found = {**dict.fromkeys(ENDS, ""), **{f".{key}": key for key in CLIPS}}, {}
    for key, rows in tensors.items():
        end = next((end for end in ends if key.endswith(end)), None)
        if key.startswith(BUNDLED) and end:
            word = found.setdefault(key.removeprefix(BUNDLED).removesuffix(end), {})
            word[_encoder(ends[end], family, path)] = _rows(rows, path)
    return found, {key: value for key, value in tensors.items() if not key.startswith(BUNDLED)}


def bundle(word: str, rows: Mapping[str, Any], family: Family) -> dict[str, Float32[np.ndarray, "n C"]]:
    """Returns {tensor's name: rows} that bundle a word with a LoRA, for A1111 and OneTrainer."""
    return {
        f"{BUNDLED}{word}{ENDS[0] if len(rows) == 1 else f'.{family.rows[encoder]}'}": np.asarray(some, np.float32)
        for encoder, some in rows.items()
    }


def _rows(rows, path):
    if rows.ndim not in (1, 2) or not rows.size or not jnp.issubdtype(rows.dtype, jnp.floating):
        kind = f"a tensor {list(rows.shape)}"
        raise ValueError(f"{path}: {kind}; an embedding has rows [n C] or one row [C], of floating point")
    return np.atleast_2d(rows).astype(np.float32)


def from_picture(path: pathlib.Path) -> Any:
    """Returns the embedding in a picture, A1111's JSON with tensors as nested lists, or None for another picture.

    It is in the text `sd-ti-embedding`, in base64, and in the pixels, which are read if there is no such text.
    Raises ValueError for unreadable content, and Pillow's errors for a file that is not a picture.
    """
    from PIL import Image

    from sdjax.formats.adapters import embedding_pixels

    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get("sd-ti-embedding")
        try:
            if text is None:
                return embedding_pixels.read(picture, _tensor)
            return json.loads(base64.b64decode(text, validate=True), object_hook=_tensor)
        except (ValueError, TypeError, RecursionError) as error:
            where = "its pixels" if text is None else "sd-ti-embedding"
            raise ValueError(f"{path}: {where} cannot be read: {str(error).splitlines()[0]}") from None


def _tensor(values):
    return np.array(values["TORCHTENSOR"], np.float32) if "TORCHTENSOR" in values else values


def check(sd: StableDiffusion, words: Words, path: pathlib.Path) -> None:
    """Raises ValueError, naming the file, for rows of other text encoders than the model's, or of another width."""
    for rows in words.values():
        if rows.keys() != sd.tokenizers.keys():
            there, wanted = ", ".join(rows), ", ".join(sd.tokenizers)
            raise ValueError(f"{path}: an embedding for {there}; this model has {wanted}")
        for encoder, some in rows.items():
            width = sd.table(encoder).shape[1]
            if some.shape[1] != width:
                raise ValueError(f"{path}: rows of width {some.shape[1]}; this model's {encoder} takes {width}")


def add(sd: StableDiffusion, words: Words, path: pathlib.Path) -> StableDiffusion:
    """Returns sd with these words; a word that consists of existing tokens replaces them in prompts.

    words: {word: {text encoder: rows [n C]}}.
    Raises ValueError for rows that do not fit the text encoders and for a word that sd already has.
    """
    check(sd, words, path)
    for word, rows in words.items():
        if sd.knows(word):
            raise ValueError(f"{path}: word={word!r}: the model knows it already; give another with word=")
        count = len(next(iter(rows.values())))
        sd = _with_room(sd, count).add_word(word, count, place=True)
        sd = sd.with_rows(sd.ids(word), {encoder: jnp.asarray(some) for encoder, some in rows.items()})
    return sd


def taken(sd: StableDiffusion) -> tuple[StableDiffusion, Words]:
    """Returns (sd without placeholder words, the words), for formats with no place for them."""
    words = {word: jax.tree.map(lambda rows: np.asarray(rows, np.float32), sd.rows(word)) for word in sd.words}
    for encoder, old in sd.tokenizers.items():
        tokenizer = replace(old, added=tuple(token for token in old.added if token["special"]))
        network = sd.networks[encoder]
        network = network.clone(config=replace(network.config, vocab_size=tokenizer.size))
        tables = trees.edit(sd.parts[encoder], f"^{TOKENS}$", lambda name, weight: weight[: tokenizer.size])  # noqa: B023
        sd = sd.replace(tokenizers=FrozenDict({**sd.tokenizers, encoder: tokenizer}), words={})
        sd = sd.with_networks(**{encoder: network}).with_parts(**{encoder: tables})
    return sd, words


def write(path: pathlib.Path, words: Words, family: Family, about: Mapping[str, Any] | None = None) -> pathlib.Path:
    """Writes words in the layout for the path's ending, and returns the path.

    .safetensors and .bin are diffusers' layout, {word: rows}; about: metadata for .safetensors.  A1111 and ComfyUI also
    read such a file if it has one word; they take the file's name for the word.
    .pt is A1111's layout, for one word; about: "name", "step", "sd_checkpoint" and so on.  string_to_token is always
    CLIP's "*".
    With two text encoders only .safetensors is possible, {"clip_l": rows, "clip_g": rows} for one word, which is in the
    header.
    Raises ValueError for other endings with two text encoders, and for several words if the layout holds one.
    """
    if any(len(rows) > 1 for rows in words.values()):
        if path.suffix != ".safetensors" or len(words) != 1:
            raise ValueError(f"{path}: {len(words)} words of several text encoders; expected one, as .safetensors")
        ((word, rows),) = words.items()
        rows_of = {family.rows[encoder]: np.asarray(some, np.float32) for encoder, some in rows.items()}
        about = {**(about or {}), WORD: word}
    else:
        rows_of = {word: np.asarray(some, np.float32) for word, rows in words.items() for some in rows.values()}
    if path.suffix in (".bin", ".pt"):
        pickle_writer.write(path, rows_of if path.suffix == ".bin" else _a1111(rows_of, path, about or {}))
        return path
    tensors = {word: files.Tensor(rows.shape, "float32", lambda rows=rows: rows) for word, rows in rows_of.items()}
    with files.new_file(path) as temporary:
        files.write_safetensors(temporary, tensors, {"format": "pt", **(about or {})})
    return path


def _a1111(words, path, about):
    """Returns A1111's dict of one word's rows."""
    if len(words) != 1:
        raise ValueError(f"{path}: {len(words)} words; expected one, whose name there is the file's")
    ((word, rows),) = words.items()
    told = {name: about.get(name) for name in SAID}
    told["name"] = told["name"] or word  # diffusers takes it for the word
    return {"string_to_token": {"*": STAR}, "string_to_param": {"*": rows}, **told}


def _with_room(sd, rows):
    """Returns sd with token tables large enough for more rows, a multiple of BLOCK."""
    for encoder, tokenizer in sd.tokenizers.items():
        if tokenizer.size + rows > len(sd.table(encoder)):
            sd = sd.with_room(encoder, -(-(tokenizer.size + rows) // BLOCK) * BLOCK)
    return sd
