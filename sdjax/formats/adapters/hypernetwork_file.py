"""A1111's hypernetwork files, which are pickles; see hypernetworks.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax import trees
from sdjax.formats.adapters import hypernetworks
from sdjax.formats.adapters.about import a1111_keys
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.storage import pickle_writer
from sdjax.methods.adapter import Adapter
from sdjax.models.hypernetworks import Hypernetwork
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

SETTINGS = {  # A1111's names of the method's settings that determine the layers
    "layer_structure": "layer_structure",
    "activation": "activation_func",
    "layer_norm": "is_layer_norm",
    "activate_output": "activate_output",
    "dropout": "dropout_structure",
}


class HypernetworkFile(Format):
    """A1111's hypernetwork: pairs of networks by width, and their settings."""

    name, called, tags, listed = "hypernetwork", "hypernet", ("hypernet",), "Hypernet hashes"  # this key is ours
    suffixes = (".pt", ".ckpt", ".bin")

    def matches(self, file: File) -> bool:
        """Returns whether a pickle's keys are widths, as A1111's are."""
        return hypernetworks.recognised(file.keys)

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether the adapter is a hypernetwork and nothing else."""
        return isinstance(adapter.hook, Hypernetwork) and not (adapter.edits or adapter.words or adapter.trees)

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the hook of a file, with A1111's metadata in about["file"]."""
        hook, said = hypernetworks.read(file.content, file.path)
        return Adapter(hook=hook, about={"file": said})

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes NAME.pt with A1111's metadata (steps, base model, kind of initial weights) and returns its path."""
        about = dict(about or {})
        path = Path(folder) / f"{about.get('ss_output_name') or 'hypernetwork'}.pt"
        told = {"name": path.stem, **adapter.about.get("file", {})}
        settings = adapter.about.get("settings", {})
        if "weight_init" in settings:
            told["weight_initialization"] = settings["weight_init"]
        pickle_writer.write(path, hypernetworks.content(adapter.hook, {**told, **a1111_keys(about)}))
        return path

    def start(
        self, adapter: Adapter, method: Any, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the file's networks.  Raises SettingError if their settings differ."""
        if adapter.hook.rows != method.rows:
            theirs = hypernetworks.settings(adapter.hook)
            ours = hypernetworks.settings(Hypernetwork({}, 1.0, rows=method.rows))
            name = next(name for name, there in SETTINGS.items() if theirs[there] != ours[there])
            raise SettingError(name, getattr(method, name), f"{theirs[SETTINGS[name]]!r}, with which it was trained")
        if set(adapter.hook.networks) != set(trained):
            raise SettingError("sizes", tuple(map(int, trained)), f"{', '.join(adapter.hook.networks)}, as in the file")
        return trees.copy(adapter.hook.networks, "float32"), frozen

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on its use here and in A1111; diffusers does not read hypernetworks."""
        return [
            f"here       sdjax text2img --model {model} --adapter {path} --prompt TEXT",
            f"A1111      copy it to models/hypernetworks/, then prompt <hypernet:{path.stem}:1>",
        ]
