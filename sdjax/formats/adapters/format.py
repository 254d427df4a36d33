"""The interface of an adapter format: it recognises, reads and writes files, and training starts from them.

A new format is a new file in this package (in sdjax.formats if it also reads networks); `known` of kinds.py finds it.
Then attach, prompts such as <bias:NAME:0.5>, programs, records, exports and training use it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.storage import hashes
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method
from sdjax.stable_diffusion import StableDiffusion


class Format(Protocol):
    """One format.

    name: its name in the `formats` of methods.
    called: its name in records, notes and errors, such as "lora"; several formats may share one.  "" for a format that
    cannot be attached because only training understands it.
    tags: prefixes in prompts, <lora:NAME:0.8>; () if prompts name such files by their word alone.
    suffixes: endings of its files.  filling: file names that other programs use inside a folder of its own.
    last: try this format after the others, because it accepts almost any file.
    listed: the key in A1111's text under which records list hashes of such files; "" for "Name hashes".
    hub: names of its files in a hub repository; () for a format without repositories.
    """

    name: Any = ""
    called: Any = ""
    tags: Any = ()
    suffixes: Any = (".safetensors",)
    filling: Any = ()
    last: Any = False
    listed: Any = ""
    hub: Any = ()

    def matches(self, file: File) -> bool:
        """Returns whether a file has this format.  An error it raises is reported if no other format matches."""
        ...

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the adapter in a file; raises ValueError naming the file and what does not fit."""
        ...

    def acts(self, adapter: Adapter, sd: StableDiffusion) -> Adapter:
        """Returns the adapter in the form that `attach` uses, if that differs from the form for training."""
        return adapter

    def digest(self, path: Path) -> str:
        """Returns the hash in records: AutoV3, 12 hex digits, of the tensors or of another kind of file.

        A folder has sdjax's own hash, see hashes.of_folder.
        """
        return hashes.of_folder(path) if path.is_dir() else hashes.autov3(path)

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether this format can hold all of an adapter; False for read-only formats."""
        return False

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes an adapter into a folder and returns the path of the file.

        about: metadata for the file's header, see about.py; "ss_output_name" is the file's name.
        """
        raise ValueError(f"{folder}: sdjax reads the format {self.name} but does not write it")

    def single(self, adapter: Adapter, path: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes an adapter whose `write` makes a folder as one file for A1111 and ComfyUI; returns its path.

        about: as in `write`.
        """
        raise ValueError(f"{path}: sdjax does not write the format {self.name} as one file")

    def brings(self, adapter: Adapter, sd: StableDiffusion) -> StableDiffusion:
        """Returns sd with the additional parts of a file, for training to start from."""
        return sd

    def start(
        self, adapter: Adapter, method: Method, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the file's weights as initial values.

        Raises SettingError for a method's setting that differs from the file's, ValueError for weights that do not fit.
        """
        raise ValueError(f"training cannot start from the format {self.name}")

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on the use of a written file here, in diffusers and in A1111; model: its base model."""
        return [f"here       sdjax text2img --model {model} --adapter {path} --prompt TEXT"]
