"""Writes tests/data/fuzz/: small adapters as torch, diffusers and peft write them, for the model random:tiny.

    python tests/fuzz/foreign.py

The files are in the repository, so fuzzing does not need these packages.
"""

import base64
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import adapter_files  # noqa: E402
import peft  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from PIL import Image, PngImagePlugin  # noqa: E402
from test_lora import by_diffusers, kohya, noised, save  # noqa: E402

FOLDER = Path(__file__).parents[1] / "data" / "fuzz"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # [32 32]
FEW = ["to_k", "proj_in"]
HYPER = {"layer_structure": [1, 2, 1], "activation_func": "relu", "is_layer_norm": True, "activate_output": False}


def main() -> None:
    """Deletes the folder and writes all files again."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    port()
    for kind in (adapters, embeddings, hypernetworks):
        place = FOLDER / kind.__name__
        place.mkdir(parents=True)
        kind(place)


def _noise(*shape, seed=0):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fresh(kind):
    """Returns a diffusers pipeline with as few layers as random:tiny."""
    made = adapter_files.fresh(kind)
    text = getattr(made.text_encoder, "text_model", made.text_encoder)
    text.encoder.layers = text.encoder.layers[:2]
    return made


def adapters(folder):
    """LoRAs of sd-scripts, diffusers and PEFT; LoHa, LoKr and DoRA with the names of LyCORIS and PEFT."""
    few = dict(list(kohya(fresh("sd1"), ("to_k", "conv1")).items())[:18])
    save(few, folder / "kohya.safetensors", {"ss_network_dim": "3", "ss_tag_frequency": '{"a": {"b": 1}}'})
    torch.save(few, folder / "kohya.pt")
    by_diffusers(fresh("sd1"), folder / "diffusers", targets=("to_k", "proj_in"), lora_alpha=6)
    kinds = {
        "loha": {"hada_w1_a": (32, 3), "hada_w1_b": (3, 32), "hada_w2_a": (32, 3), "hada_w2_b": (3, 32)},
        "lokr": {"lokr_w1": (4, 2), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 16)},
        "dora": {"lora_down.weight": (3, 32), "lora_up.weight": (32, 3), "dora_scale": (32, 1)},
    }
    for name, shapes in kinds.items():
        tensors = {f"{KEY}.{part}": _noise(*shape) for part, shape in shapes.items()}
        save({**tensors, f"{KEY}.alpha": torch.tensor(2.0)}, folder / f"{name}.safetensors")
    for name, config in {
        "peft": peft.LoraConfig(r=2, lora_alpha=4, target_modules=FEW, rank_pattern={"proj_in": 3}),
        "peft_loha": peft.LoHaConfig(r=2, alpha=3, target_modules=FEW),
        "peft_lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=FEW),
    }.items():
        noised(peft.get_peft_model(fresh("sd1").unet, config)).save_pretrained(folder / name)
        (folder / name / "README.md").unlink(missing_ok=True)


def embeddings(folder):
    """Textual inversions of A1111 (both containers and a picture), diffusers and sd-scripts."""
    rows, about = _noise(3, 32), {"string_to_token": {"*": 265}, "name": "toy", "step": 9, "sd_checkpoint": None}
    torch.save({**about, "string_to_param": {"*": rows}}, folder / "a1111.pt")
    torch.save({**about, "string_to_param": {"*": rows}}, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"<toy>": rows}, folder / "learned_embeds.bin")
    safetensors.torch.save_file({"<toy>": rows}, folder / "toy.safetensors")
    safetensors.torch.save_file({"emb_params": rows}, folder / "params.safetensors")
    values, info = {**about, "string_to_param": {"*": {"TORCHTENSOR": rows.tolist()}}}, PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(values).encode()).decode())
    Image.new("RGB", (8, 8)).save(folder / "card.png", pnginfo=info)


def hypernetworks(folder):
    """A1111's hypernetworks, in both containers."""
    held = {
        32: tuple(
            {
                "linear.0.weight": _noise(64, 32), "linear.0.bias": _noise(64),
                "linear.2.weight": _noise(64), "linear.2.bias": _noise(64),
                "linear.3.weight": _noise(32, 64), "linear.3.bias": _noise(32),
                "linear.4.weight": _noise(32), "linear.4.bias": _noise(32),
            }
            for _ in range(2)
        )
    }  # fmt: skip
    for name, new in (("hyper", True), ("hyper_old", False)):
        torch.save(
            {**held, "step": 5, "name": "x", "sd_checkpoint": None, **HYPER}, folder / f"{name}.pt",
            _use_new_zipfile_serialization=new,
        )  # fmt: skip


def port():
    """Writes the names and shapes in the unofficial E4T's files, and its settings; the values would take 0.5 MB."""
    from port_folder import CONFIG, Port

    held = Port(fresh("sd1").unet, fresh("sd1").text_encoder, width=64)
    place = FOLDER / "port"
    held.write(place)
    state = {name: torch.load(place / name) for name in ("encoder.pt", "weight_offsets.pt")}
    shutil.rmtree(place)
    told = {file: {name: list(x.shape) for name, x in tensors.items()} for file, tensors in state.items()}
    (FOLDER / "port.json").write_text(json.dumps({"config": CONFIG, "files": told}) + "\n")


if __name__ == "__main__":
    main()
