"""LoRA and its relatives as files: every tool's names are read, see lora.py."""

import hashlib
import json
from pathlib import Path

from sdjax.formats.adapters import embeddings, lora, peft_settings
from sdjax.formats.adapters import file as files
from sdjax.formats.adapters.file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.storage import hashes
from sdjax.methods.adapter import Adapter
from sdjax.stable_diffusion import StableDiffusion

STEMS = ("pytorch_lora_weights", "adapter_model")  # diffusers' and peft's names


class Kohya(Format):
    """Edits of weights, and the embeddings that are bundled with them."""

    name, called, tags, listed = "kohya", "lora", ("lora", "lyco"), "Lora hashes"
    suffixes = (".safetensors", ".pt", ".ckpt", ".bin")
    filling = tuple(f"{stem}{end}" for end in (".safetensors", ".bin") for stem in STEMS)

    def matches(self, file: File) -> bool:
        """Returns whether tensors have the names of LoRA or a relative, supported or not."""
        return bool(file.keys) and all(type(key) is str for key in file.keys) and lora.recognised(file.keys)

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the edits of a file, and the words that are bundled with it."""
        words, tensors = embeddings.bundled(file.content, file.path)
        tensors = {name: value for name, value in tensors.items() if type(value) is not dict}  # of Custom Diffusion
        settings = peft_settings.of_file(file.path, tensors, file.metadata)
        return Adapter(lora.read(tensors, sd.networks, settings, file.path), words)

    def digest(self, path: Path) -> str:
        """Returns AutoV3, the hash of the tensors; with PEFT's settings, which act too, 12 digits of a hash of both.

        Others leave the settings out, so that a file with another alpha in its header keeps its hash there.
        """
        file = files.of(path)
        found = peft_settings.kept(path, file.keys, file.metadata)
        acting = {name: x for name, x in found.items() if name.rpartition(".")[2] in peft_settings.APPLIED}
        if not acting:
            return hashes.autov3(path)
        text = json.dumps(acting, sort_keys=True)
        return hashlib.sha256(f"{hashes.autov3(path)} {text}".encode()).hexdigest()[:12]
