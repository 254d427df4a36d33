"""Valid files of every kind that the readers take, made by torch, diffusers, peft and Pillow; each loads as it is.

seeds = make(folder)          # list of Seed
"""

import base64
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch
from adapter_files import fresh
from PIL import Image, PngImagePlugin
from test_lora import by_diffusers, kohya, noised, save

import sdjax
from sdjax.sampling.settings import TextToImage
from sdjax.service import records

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"  # [32 32]
FEW = ["to_k", "proj_in"]
HYPER = {"layer_structure": [1, 2, 1], "activation_func": "relu", "is_layer_norm": True, "activate_output": False}


@dataclass(frozen=True)
class Seed:
    """A valid file: `file` is the one that is damaged, `root` the folder around it, or the file itself."""

    reader: str
    root: Path
    file: Path

    @property
    def name(self) -> str:
        """Its place below the folder of seeds' kind."""
        return str(self.file.relative_to(self.root.parent))


def make(folder: Path) -> list[Seed]:
    """Writes the seeds below a folder and returns them."""
    found = []
    for kind in (adapters, embeddings, hypernetworks, models, runs, lists, pictures, folders):
        place = folder / kind.__name__
        place.mkdir(parents=True)
        found += kind(place)
    return found


def _alone(reader, *paths):
    return [Seed(reader, path, path) for path in paths]


def _noise(*shape, seed=0):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapters(folder):
    """LoRA of sd-scripts, diffusers and PEFT, and its relatives under LyCORIS' and PEFT's names."""
    few = dict(list(kohya(fresh("sd1"), ("to_k", "conv1")).items())[:18])
    made = [save(few, folder / "kohya.safetensors", {"ss_network_dim": "3", "ss_tag_frequency": '{"a": {"b": 1}}'})]
    torch.save(few, folder / "kohya.pt")
    by_diffusers(fresh("sd1"), folder / "diffusers", targets=("to_k", "proj_in"), lora_alpha=6)
    kinds = {
        "loha": {"hada_w1_a": (32, 3), "hada_w1_b": (3, 32), "hada_w2_a": (32, 3), "hada_w2_b": (3, 32)},
        "lokr": {"lokr_w1": (4, 2), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 16)},
        "dora": {"lora_down.weight": (3, 32), "lora_up.weight": (32, 3), "dora_scale": (32, 1)},
    }
    for name, shapes in kinds.items():
        tensors = {f"{KEY}.{part}": _noise(*shape) for part, shape in shapes.items()}
        made.append(save({**tensors, f"{KEY}.alpha": torch.tensor(2.0)}, folder / f"{name}.safetensors"))
    peft_files = []
    for name, config in {
        "peft": peft.LoraConfig(r=2, lora_alpha=4, target_modules=FEW, rank_pattern={"proj_in": 3}),
        "peft_loha": peft.LoHaConfig(r=2, alpha=3, target_modules=FEW),
        "peft_lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=FEW),
    }.items():
        place = folder / name
        noised(peft.get_peft_model(fresh("sd1").unet, config)).save_pretrained(place)
        peft_files += [
            Seed("attach", place, place / part) for part in ("adapter_model.safetensors", "adapter_config.json")
        ]
    place = folder / "diffusers"
    return [
        *_alone("attach", *made, folder / "kohya.pt"),
        *peft_files,
        Seed("attach", place, place / "pytorch_lora_weights.safetensors"),
    ]


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
    return _alone("attach", *sorted(folder.iterdir()))


def hypernetworks(folder):
    """A1111's hypernetworks, in both containers."""
    held = {
        width: tuple(
            {
                "linear.0.weight": _noise(2 * width, width), "linear.0.bias": _noise(2 * width),
                "linear.2.weight": _noise(2 * width), "linear.2.bias": _noise(2 * width),
                "linear.3.weight": _noise(width, 2 * width), "linear.3.bias": _noise(width),
                "linear.4.weight": _noise(width), "linear.4.bias": _noise(width),
            }
            for _ in range(2)
        )
        for width in (32, 64)
    }  # fmt: skip
    for name, new in (("hyper", True), ("hyper_old", False)):
        torch.save(
            {**held, "step": 5, "name": "x", "sd_checkpoint": None, **HYPER}, folder / f"{name}.pt",
            _use_new_zipfile_serialization=new,
        )  # fmt: skip
    return _alone("attach", *sorted(folder.iterdir()))


def models(folder):
    """A model as a folder (each file of it), and as a single file in three containers."""
    sd = sdjax.load("random:tiny")
    sdjax.save(sd, folder / "model")
    single = []
    for name in ("single.safetensors", "single.ckpt", "old.ckpt"):
        place = folder / name.replace(".", "_")
        shutil.copytree(folder / "model" / "tokenizer", place / "tokenizer")
        single.append(Seed("single", place, place / name))
    sdjax.save(sd, single[0].file, "single-file")
    state = safetensors.torch.load_file(single[0].file)
    torch.save({"state_dict": state, "epoch": 3}, single[1].file)
    torch.save({"state_dict": state}, single[2].file, _use_new_zipfile_serialization=False)
    parts = sorted(path for path in (folder / "model").rglob("*") if path.is_file() and path.suffix != ".md")
    tokens = [Seed("tokenizer", path.parent, path) for path in parts if path.parent.name == "tokenizer"]
    whole = [Seed("load", folder / "model", path) for path in parts]
    return [*whole, *tokens, *single]


def runs(folder):
    """A run's folder with one checkpoint."""
    from sdjax.data.batches import Data
    from sdjax.methods.textual_inversion import TextualInversion
    from sdjax.training import loop

    photos = folder / "photos"
    photos.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(photos / "a.png")
    told = loop.Train(
        model="random:tiny", method=TextualInversion("<cat>"), steps=1, checkpoint=1,
        data=Data(path=str(photos), word="<cat>", templates="object", batch=1),
    )  # fmt: skip
    loop.train(told, folder / "run")
    shutil.rmtree(folder / "run" / "export", ignore_errors=True)
    parts = [p for p in sorted((folder / "run").rglob("*")) if p.is_file() and p.name not in (".lock", "lock")]
    return [Seed("run", folder / "run", path) for path in parts if path.suffix != ".png"]


def lists(folder):
    """Lists of pictures as JSONL, CSV and parquet."""
    rows = [
        {"prompt": f"a cat {i}", "seed": i, "steps": 3, "guidance": 5.0, "name": f"cat-{i}", "negative_prompt": "bad"}
        for i in range(3)
    ]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "list.parquet")
    return _alone("list", *sorted(folder.iterdir()))


def pictures(folder):
    """Pictures with records of ours and of A1111, masks, and plain ones in several formats."""
    made = np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8)
    record = records.of(TextToImage(prompt="a cat", seed=3), (16, 16))
    for ending in ("png", "jpg", "webp"):
        records.save(folder / f"own.{ending}", made, record)
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "a (cat:1.2)\nNegative prompt: bad\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, "
        'Model: "x", Hashes: {"a": "b"}',
    )
    Image.fromarray(made).save(folder / "a1111.png", pnginfo=info)
    (folder / "own.json").write_text(records.to_json(record))
    for mode in ("L", "LA", "RGBA", "P", "I;16", "1"):
        Image.new(mode, (16, 16), 1).save(folder / f"mode-{mode.replace(';', '')}.png")
    Image.fromarray(made).save(folder / "plain.gif")
    Image.fromarray(made).save(folder / "plain.bmp")
    Image.fromarray(made).save(folder / "plain.tiff")
    own = [path for path in sorted(folder.iterdir()) if path.stem in ("own", "a1111")]
    drawn = [path for path in sorted(folder.iterdir()) if path.suffix != ".json"]
    return [
        *_alone("record", *own),
        *_alone("picture", *drawn),
        *_alone("mask", *(p for p in drawn if "mode" in p.name)),
    ]


def folders(folder):
    """A folder of training pictures with captions, metadata and masks."""
    place = folder / "photos"
    (place / "3_a cat").mkdir(parents=True)
    made = np.random.default_rng(2).integers(0, 255, (16, 16, 3), np.uint8)
    for name in ("a", "b", "3_a cat/c"):
        Image.fromarray(made).save(place / f"{name}.png")
    (place / "a.txt").write_text("a cat, sitting")
    Image.new("L", (16, 16), 200).save(place / "a.mask.png")
    (place / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a dog"}\n')
    names = ("a.txt", "metadata.jsonl", "a.mask.png", "a.png")
    return [Seed("photos", place, place / name) for name in names]
