"""LoRA and its relatives: reads the names of all tools (lora.py), writes those of sd-scripts and LyCORIS."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.formats.adapters import adapter_file, embeddings, lora, lora_pti, lora_start, lora_tensors, peft_settings
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.format import Format
from sdjax.formats.storage import hashes
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method
from sdjax.stable_diffusion import StableDiffusion

LYCORIS = {"loha": "hada_w1_b", "lokr": "lokr_w1", "diag-oft": "oft_blocks"}  # LyCORIS' name: its factor
STEMS = ("pytorch_lora_weights", "adapter_model")  # diffusers' and peft's names


class Kohya(Format):
    """LoRA, DoRA, LoHa, LoKr and full differences: reads every layout, writes kohya's; bundled embeddings too."""

    name, called, tags, listed = "kohya", "lora", ("lora", "lyco"), "Lora hashes"
    suffixes = (".safetensors", ".pt", ".ckpt", ".bin")
    filling = tuple(f"{stem}{end}" for end in (".safetensors", ".bin") for stem in STEMS)

    def matches(self, file: File) -> bool:
        """Returns whether any tensor has the name of LoRA or a relative, supported or not."""
        return bool(file.keys) and all(type(key) is str for key in file.keys) and lora.recognised(file.keys)

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the edits of a file, and the words bundled with it."""
        words, tensors = embeddings.bundled(file.content, file.path, sd.family)
        tensors, learned = lora_pti.named(tensors, file.metadata, sd, file.path)
        for word, rows in learned.items():
            words |= embeddings.read({word: rows}, file.path, sd.family)
        tensors = {name: value for name, value in tensors.items() if type(value) is not dict}  # of Custom Diffusion
        settings = peft_settings.of_file(file.path, tensors, file.metadata)
        return Adapter(lora.read(tensors, sd, settings, file.path), words)

    def digest(self, path: Path) -> str:
        """Returns AutoV3, the hash of the tensors; for files with PEFT's settings, 12 digits of a hash of both.

        PEFT's settings change the result; other programs hash only the tensors, so another alpha keeps their hash.
        """
        file = adapter_file.of(path)
        found = peft_settings.kept(path, file.keys, file.metadata)
        acting = {name: x for name, x in found.items() if name.rpartition(".")[2] in peft_settings.APPLIED}
        if not acting:
            return hashes.autov3(path)
        text = json.dumps(acting, sort_keys=True)
        return hashlib.sha256(f"{hashes.autov3(path)} {text}".encode()).hexdigest()[:12]

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether the adapter is edits by factors, perhaps with words to bundle."""
        return lora_tensors.whole(adapter)

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes NAME.safetensors with sd-scripts' names, or LyCORIS' for its kinds, and every weight's alpha.

        NAME is ss_output_name, or "lora".
        """
        about = dict(about or {})
        tensors = lora_tensors.for_kohya(adapter)
        for word, rows in adapter.words.items():
            tensors |= embeddings.bundle(word, rows, adapter.family)
        path = Path(folder) / f"{about.get('ss_output_name') or 'lora'}.safetensors"
        args = {"ss_network_args": _joined(_network(adapter), about)}
        return lora_tensors.write(path, tensors, {**_network(adapter), **lora_tensors.told(adapter), **about, **args})

    def start(
        self, adapter: Adapter, method: Method, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the file's factors as initial values."""
        return lora_start.started(adapter, method, trained), frozen

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on the use of the file here, in diffusers or LyCORIS, and in A1111."""
        thin = all({"down", "up"} <= set(factors) for *_, factors in lora_tensors.modules(adapter))
        there = f'diffusers  pipe.load_lora_weights("{path.parent}", weight_name="{path.name}")'
        return [
            f"here       sdjax text2img --model {model} --adapter {path} --prompt TEXT",
            there if thin else f'LyCORIS    create_lycoris_from_weights(1.0, "{path}", pipe.unet)',
            f"A1111      copy it to models/Lora/, then prompt <lora:{path.stem}:1>",
        ]


def _joined(*told):
    """Returns the entries ss_network_args of several metadata as one JSON text."""
    found = [json.loads(one.get("ss_network_args", "{}")) for one in told]
    return json.dumps({name: value for one in found for name, value in one.items()})


def _network(adapter):
    """Returns the header's entries for A1111 and sd-scripts: module, rank, alpha, and LyCORIS' algorithm."""
    held = [factors for *_, factors in lora_tensors.modules(adapter) if "diff_b" not in factors]
    ranks = [rank for factors in held if (rank := lora_tensors.rank(factors)) is not None]
    names = {name for factors in held for name in factors}
    algo = next((algo for algo, name in LYCORIS.items() if name in names), "lora")
    dora = bool(names & {"outputs", "inputs"})
    plain = algo == "lora" and not dora
    args = {} if plain else {"algo": algo, "dora_wd": str(dora)}
    alphas = [float(lora_tensors.alpha(factors)) for factors in held if "diff" not in factors]
    return {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(max(ranks, key=ranks.count)) if ranks else "Dynamic",
        "ss_network_alpha": f"{max(alphas, key=alphas.count):g}" if alphas else "Dynamic",
        "ss_network_args": json.dumps(args),
    }
