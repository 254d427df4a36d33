"""LoRA and DoRA in diffusers' format: pytorch_lora_weights.safetensors with alpha in its header."""

import json
from collections.abc import Mapping
from pathlib import Path

from sdjax.formats.adapters import lora_tensors, peft_written
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.adapters.peft_settings import METADATA
from sdjax.methods.adapter import Adapter

NAME = "pytorch_lora_weights.safetensors"


class DiffusersLora(Format):
    """LoRA with diffusers' names, written only; the format `kohya` reads them."""

    name = "diffusers"

    def matches(self, file: File) -> bool:
        """Returns False: kohya.py reads every layout."""
        return False

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether all edits are LoRA or DoRA, without words."""
        return lora_tensors.whole(adapter) and not adapter.words and peft_written.kind(adapter) == "LORA"

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes pytorch_lora_weights.safetensors and returns its path."""
        settings = {}
        for part in adapter.edits:
            settings |= {f"{part}.{name}": value for name, value in peft_written.written(adapter, part).items()}
        metadata = {**lora_tensors.told(adapter), **(about or {}), METADATA: json.dumps(settings, sort_keys=True)}
        tensors = lora_tensors.for_diffusers(adapter)
        return lora_tensors.write(Path(folder) / NAME, tensors, metadata)

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on the use of the file here and in diffusers."""
        return [
            f"here       sdjax text2img --model {model} --adapter {path} --prompt TEXT",
            f'diffusers  pipe.load_lora_weights("{path.parent}")',
        ]
