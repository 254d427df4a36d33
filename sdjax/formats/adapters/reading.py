"""Files of adapters: where one lies, what kind it is, told by what it holds, and what it brings to a model.

path = locate("ink")                         # a file, or the one in a folder that diffusers or peft wrote
adapter = read(path, sd.networks)            # Adapter(edits, words, hook)
"""

import functools
import pathlib
from typing import Any

from flax.core import FrozenDict

from sdjax.formats.adapters import embeddings, hypernetworks, lora, peft_settings
from sdjax.formats.storage import pickles
from sdjax.formats.storage.guard import named
from sdjax.formats.storage.tensor_file import TensorFile
from sdjax.methods.adapter import Adapter

# What a folder may hold, in the order of choice: diffusers' and peft's names.
FILES = [
    f"{stem}{kind}"
    for kind in (".safetensors", ".bin")
    for stem in ("pytorch_lora_weights", "adapter_model", "learned_embeds")
]


def chosen(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the file of a folder that diffusers or peft wrote, None where there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def locate(source: str | pathlib.Path) -> pathlib.Path:
    """Returns the whole path of an adapter's file.  Raises ValueError where there is none."""
    path = pathlib.Path(source).resolve()
    if path.is_dir():
        found = chosen(path)
        if found is None:
            raise ValueError(f"{source}: a folder without {', '.join(FILES)}")
        return found
    if not path.is_file():
        raise ValueError(f"{source}: no such file")
    return path


def read(path: pathlib.Path, networks: FrozenDict[str, Any], word: str | None = None) -> Adapter:
    """Returns what a file brings to these networks.

    word: of an embedding, in place of the file's.
    Raises ValueError, or OSError of Pillow's, in one line that names the file, whatever it holds.
    """
    with named(path):
        return _read(path, word, networks)


def described(path: pathlib.Path) -> tuple[tuple[str, ...] | None, dict[str, str]]:
    """Returns (names of its tensors, metadata) of safetensors, without reading one; (None, {}) of another file."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] != b"{":
        return None, {}
    held = TensorFile(path)
    return tuple(held.names), held.metadata


def _read(path, word, networks):
    state, metadata = _content(path)
    kind = _kind(state)
    if word is not None and kind != "embedding":
        raise ValueError(f"{path}: word={word!r}: only embeddings have a word, and this is of the kind {kind}")
    if kind == "hypernet":
        return Adapter({}, {}, hypernetworks.read(state, path))
    if kind == "embedding":
        return Adapter({}, embeddings.read(state, path, word))
    words, tensors = embeddings.bundled(state, path)
    tensors = {name: value for name, value in tensors.items() if type(value) is not dict}  # of Custom Diffusion
    return Adapter(lora.read(tensors, networks, peft_settings.of_file(path, tensors, metadata), path), words)


def kind(path: pathlib.Path) -> str:
    """Returns what a file is: "lora", "hypernet", "embedding", or "picture" for one that holds no embedding.

    Of safetensors only the names are read.
    Raises ValueError or OSError in one line, naming the file, where that cannot be told.
    """
    about = path.stat()
    with named(path):
        return _known_kind(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=1024)
def _known_kind(path, time, size):
    names, _ = described(path)
    state = _content(path)[0] if names is None else dict.fromkeys(names)
    return "picture" if state is None else _kind(state)


def _kind(state):
    if hypernetworks.recognised(state):
        return "hypernet"
    if isinstance(state, dict) and all(type(name) is str for name in state) and lora.recognised(state):
        return "lora"
    return "embedding"


def _content(path: pathlib.Path) -> tuple[Any, dict[str, str]]:
    """Returns (what a file holds, a safetensors file's metadata)."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith(b"\x89PNG"):
        return embeddings.from_picture(path), {}
    if head[8:] == b"{":
        file = TensorFile(path)
        return {name: file.read(name) for name in file.names}, file.metadata
    return pickles.read(path), {}
