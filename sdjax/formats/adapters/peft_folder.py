"""LoRA, DoRA and LoHa in PEFT's format: adapter_model.safetensors and adapter_config.json in a folder per part."""

from collections.abc import Mapping
from pathlib import Path

from sdjax.formats.adapters import lora_tensors, peft_written
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.adapters.peft_settings import CONFIG
from sdjax.formats.storage import files
from sdjax.methods.adapter import Adapter

NAME = "adapter_model.safetensors"


class PeftFolder(Format):
    """LoRA and its relatives with PEFT's names, written only; the format `kohya` reads them."""

    name = "peft"

    def matches(self, file: File) -> bool:
        """Returns False: kohya.py reads every layout."""
        return False

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether all edits are of one of these kinds, without words."""
        return lora_tensors.whole(adapter) and not adapter.words and peft_written.kind(adapter) is not None

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes a folder such as unet/ for each part with edits; returns the path of the first part's tensors."""
        paths = []
        for part, edits in adapter.edits.items():
            place = Path(folder) / part
            place.mkdir(parents=True, exist_ok=True)
            own = Adapter(edits={part: edits})
            with files.new_file(place / CONFIG) as temporary:
                files.write_json(temporary, peft_written.written(adapter, part))
            tensors = lora_tensors.named(own, lora_tensors.peft)
            paths.append(lora_tensors.write(place / NAME, tensors, {**lora_tensors.told(adapter), **(about or {})}))
        return paths[0]

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on the use of each part's folder here and with PEFT."""
        folders = [path.parents[1] / part for part in adapter.edits]
        given = " ".join(f"--adapter {folder}" for folder in folders)
        there = [f'peft       PeftModel.from_pretrained(pipe.{folder.name}, "{folder}")' for folder in folders]
        return [f"here       sdjax text2img --model {model} {given} --prompt TEXT", *there]
