"""Files of adapters: where one lies, and what it brings to a model, told by what it holds.

path = locate("ink")                         # a file, or the one in a folder that diffusers or peft wrote
adapter = read(path, sd.networks)            # Adapter(edits, words, hook)
"""

import functools
import json
import pathlib

from sdjax.formats.adapters import embeddings, hypernetworks, lora
from sdjax.formats.storage import files, pickles
from sdjax.methods.adapter import Adapter
from sdjax.stable_diffusion import Networks

# What a folder may hold, in the order of choice: diffusers' and peft's names.
FILES = [
    f"{stem}{kind}"
    for kind in (".safetensors", ".bin")
    for stem in ("pytorch_lora_weights", "adapter_model", "learned_embeds")
]
METADATA = "lora_adapter_metadata"  # diffusers: PEFT's settings in a safetensors header, "unet.lora_alpha" and so on


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


def read(path: pathlib.Path, networks: Networks, word: str | None = None) -> Adapter:
    """Returns what a file brings to these networks, from memory where it was read last.

    word: of an embedding, in place of the file's.
    Raises ValueError naming the file where it is no adapter, or of a kind that is not supported.
    """
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size, word, networks)


def described(path: pathlib.Path) -> tuple[tuple[str, ...] | None, dict[str, str]]:
    """Returns (names of its tensors, metadata) of safetensors, without reading one; (None, {}) of another file."""
    with open(path, "rb") as file:
        head = file.read(9)
    return _safetensors(path, lambda file: tuple(file.keys())) if head[8:] == b"{" else (None, {})


@functools.lru_cache(maxsize=4)
def _read(path, time, size, word, networks):
    """Returns the Adapter of a file; time and size: of the file, so that a new one is read again."""
    state, metadata = _content(path)
    if hypernetworks.recognised(state):
        return Adapter({}, {}, hypernetworks.read(state, path))
    words, tensors = embeddings.bundled(state, path) if isinstance(state, dict) else ({}, {})
    tensors = {name: value for name, value in tensors.items() if type(value) is not dict}  # of Custom Diffusion
    if lora.recognised(tensors):
        return Adapter(lora.read(tensors, networks, _peft_settings(path, tensors, metadata), path), words)
    return Adapter({}, words or embeddings.read(state, path, word))


def _content(path):
    """Returns (what a file holds, a safetensors file's metadata)."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head.startswith(b"\x89PNG"):
        return embeddings.from_picture(path), {}
    if head[8:] == b"{":
        return _safetensors(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})
    return pickles.read(path), {}


def _safetensors(path, take):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            return take(file), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {str(error).splitlines()[0]}") from None


def _peft_settings(path, tensors, metadata):
    """Returns {part: PEFT's settings}, from diffusers' metadata or from the adapter_config.json beside PEFT's file."""
    if METADATA in metadata:
        try:
            settings = json.loads(metadata[METADATA])
        except ValueError as error:
            raise ValueError(f"{path}: {METADATA} is no JSON: {error}") from None
        flat = {f"{part}.": part for part in lora.PARTS}
        return {
            part: {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
            for prefix, part in flat.items()
        }
    if any(name.startswith("base_model.model.") for name in tensors):
        return dict.fromkeys(lora.PARTS, files.read_json(path.parent / "adapter_config.json"))
    return {}
