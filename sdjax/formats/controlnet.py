"""The format of trained ControlNets: the folder of diffusers' ControlNetModel.

It is in this package because formats/adapters and formats/models do not import each other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.models import controlnet
from sdjax.formats.storage import checkpoints
from sdjax.methods.adapter import Adapter
from sdjax.models.controlnet import ControlNet, ControlNetConfig
from sdjax.sampling.control import Control
from sdjax.stable_diffusion import StableDiffusion
from sdjax.trees import cast, flatten, listing

KIND = "controlnet"


class ControlNetFolder(Format):
    """A ControlNet: diffusers' folder, or a single file with diffusers' or LDM's names."""

    name, suffixes = KIND, controlnet.ENDINGS

    def matches(self, file: File) -> bool:
        """Returns whether a folder's config.json or a file's tensor names are a ControlNet's."""
        if file.path.is_dir():
            return controlnet.is_control(file.path)
        names = checkpoints.state_of(file.content) or () if file.names is None else file.names
        return any(str(name).endswith(controlnet.MARKS) for name in names)

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether the adapter is a ControlNet and nothing else."""
        return set(adapter.trees) == {KIND} and not (adapter.edits or adapter.words) and adapter.hook is None

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the weights of a file or folder, and its config in `about`."""
        control = controlnet.load_control(file.path)
        return Adapter(trees={KIND: control.params}, about={"config": control.network.config.to_json()})

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes config.json, diffusion_pytorch_model.safetensors and metadata.json; returns the folder."""
        return controlnet.save_control(_control(adapter), folder, about=about or {})

    def single(self, adapter: Adapter, path: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes one file with the ControlNet repository's names, for A1111 and ComfyUI; returns its path."""
        return controlnet.save_control(_control(adapter), path, about=about or {})

    def start(
        self, adapter: Adapter, method: Any, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the file's weights, float32, as initial values."""
        found, wanted = flatten(adapter.trees[KIND]), flatten(trained[KIND])
        shapes = [{name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (found, wanted)]
        if shapes[0] != shapes[1]:
            odd = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
            raise ValueError(f"a ControlNet of another model; weights that do not fit: {listing(odd)}")
        return {**trained, KIND: cast(adapter.trees[KIND], jnp.float32)}, frozen

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on its use here, in diffusers and in A1111."""
        here = (
            f"here       python -m sdjax controlnet --model {model} --control {path} --control-image FILE"
            " --preprocess canny --prompt TEXT"
        )
        if path.is_file():
            return [here, "A1111      copy it to models/ControlNet/"]
        return [
            here,
            f'diffusers  ControlNetModel.from_pretrained("{path}")',
            f"A1111      python -m sdjax.convert {path} NAME.safetensors",
        ]


def _control(adapter):
    """Returns the Control of an adapter."""
    return Control(adapter.trees[KIND], ControlNet(ControlNetConfig.from_json(adapter.about["config"])))
