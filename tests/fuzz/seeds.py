"""Valid files of every kind that the readers take; each loads as it is.

seeds = make(folder)          # list of Seed

Adapters are those of torch, diffusers and peft that foreign.py has written; the rest is made here, of small shapes.
"""

import json
import pickle
import shutil
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image, PngImagePlugin

import sdjax
from sdjax.data.batches import Data
from sdjax.data.store import Store, key
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.families.sd import Sd
from sdjax.formats.models import folder, presets, single_file
from sdjax.formats.storage import parameters, pickle_writer
from sdjax.formats.storage.tensor_file import TensorFile
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.sampling.settings import TextToImage
from sdjax.service import records
from sdjax.text.tokenizer import Tokenizer
from sdjax.training import begin, checkpoint, optim, run_folder, step
from sdjax.training.settings import Train

FOREIGN = Path(__file__).parents[1] / "data" / "fuzz"
SHAPE = {  # the smallest that a file without a config can have: its readers suppose 32 groups
    "unet": dict(
        sample_size=8, cross_attention_dim=8, attention_head_dim=8, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "vae": dict(block_out_channels=(32, 32), sample_size=16),
    "text_encoder": dict(
        hidden_size=8, intermediate_size=16, num_attention_heads=1, num_hidden_layers=1, max_position_embeddings=16,
        projection_dim=8,
    ),
    "image_encoder": dict(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=16, patch_size=8,
        projection_dim=8,
    ),
}  # fmt: skip


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
    for kind in (adapters, embeddings, hypernetworks, models, runs, lists, pictures, folders, caches):
        place = folder / kind.__name__
        if (FOREIGN / kind.__name__).is_dir():
            shutil.copytree(FOREIGN / kind.__name__, place)
        place.mkdir(parents=True, exist_ok=True)
        found += kind(place)
    return found


def _alone(reader, *paths):
    return [Seed(reader, path, path) for path in paths]


def adapters(folder):
    """LoRA of sd-scripts, diffusers and PEFT, and its relatives under LyCORIS' and PEFT's names."""
    places = sorted(path for path in folder.iterdir() if path.is_dir())
    inner = [Seed("attach", place, path) for place in places for path in sorted(place.iterdir())]
    return [*_alone("attach", *sorted(path for path in folder.iterdir() if path.is_file())), *inner]


def embeddings(folder):
    """Textual inversions of A1111 (both containers and a picture), diffusers and sd-scripts."""
    return _alone("attach", *sorted(folder.iterdir()))


def hypernetworks(folder):
    """A1111's hypernetworks, in both containers."""
    return _alone("attach", *sorted(folder.iterdir()))


def small():
    """Returns a model of SHAPE."""
    tokenizer = Tokenizer.train(presets.SENTENCES, 560, 16)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    shape = {**SHAPE, "text_encoder": {**SHAPE["text_encoder"], "vocab_size": tokenizer.size, **ids}}
    parts = Sd().parts
    networks = {name: parts[name].network(parts[name].config(**given), jnp.float32) for name, given in shape.items()}
    params = {name: parameters.random_parameters(network, "float16") for name, network in networks.items()}
    return folder.assemble(Sd(), networks, params, Schedule(), {"text_encoder": tokenizer})


def models(folder):
    """A model as a folder (each file of it), and as a single file in three containers."""
    sd = small()
    sdjax.save(sd, folder / "model")
    single = []
    for name in ("single.safetensors", "single.ckpt", "old.ckpt"):
        place = folder / name.replace(".", "_")
        shutil.copytree(folder / "model" / "tokenizer", place / "tokenizer")
        single.append(Seed("single", place, place / name))
    single_file.write(sd, single[0].file)
    held = TensorFile(single[0].file)
    state = {name: held.read(name) for name in held.names}
    pickle_writer.write(single[1].file, {"state_dict": state, "global_step": 3})
    _row(single[1].file, single[2].file)
    parts = sorted(path for path in (folder / "model").rglob("*") if path.is_file() and path.suffix != ".md")
    tokens = [Seed("tokenizer", path.parent, path) for path in parts if path.parent.name == "tokenizer"]
    whole = [Seed("load", folder / "model", path) for path in parts]
    return [*whole, *tokens, *single]


def _row(archive, path):
    """Writes what an archive of torch.save holds in its older container: pickles, then count and numbers of each."""
    with zipfile.ZipFile(archive) as old:
        program = old.read("archive/data.pkl")
        names = sorted(name for name in old.namelist() if "/data/" in name)
        content = {name.rpartition("/")[2]: old.read(name) for name in names}
    heads = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    rows = b"".join(struct.pack("<q", len(data) // 2) + data for data in content.values())  # of float16
    start = b"".join(pickle.dumps(head, 2) for head in heads)
    path.write_bytes(start + program + pickle.dumps(list(content), 2) + rows)


def runs(folder):
    """A run's folder with one checkpoint, as after its first step."""
    photos, out = folder / "photos", folder / "run"
    photos.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(photos / "a.png")
    told = Train(
        model="random:tiny", method=TextualInversion("<cat>"), steps=1, checkpoint=1,
        data=Data(path=str(photos), word="<cat>", templates="object", batch=1),
    )  # fmt: skip
    trained, _, _, base = begin.begin(told, pictures=False)
    tx, _ = optim.optimizer(told.optim, told.steps)
    state = step.initial_state(trained, tx, told.ema)
    run_folder.write_settings(out, told, base)
    kept = checkpoint.Checkpoints(out / "checkpoints")
    kept.save({**jax.tree.map(np.asarray, state), "step": np.int32(1)}, base, wait=True)
    kept.close()
    parts = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in (".lock", "lock")]
    return [Seed("run", out, path) for path in parts]


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
    own = [path for path in sorted(folder.iterdir()) if path.stem in ("own", "a1111")]
    drawn = [path for path in sorted(folder.iterdir()) if path.suffix != ".json"]
    return [
        *_alone("record", *own),
        *_alone("picture", *drawn),
        *_alone("mask", *(p for p in drawn if "mode" in p.name)),
    ]


def folders(folder):
    """A folder of training pictures with captions, metadata and masks, and one for each other form of metadata."""
    place, found = folder / "photos", []
    (place / "3_a cat").mkdir(parents=True)
    made = np.random.default_rng(2).integers(0, 255, (16, 16, 3), np.uint8)
    for name in ("a", "b", "3_a cat/c"):
        Image.fromarray(made).save(place / f"{name}.png")
    (place / "a.txt").write_text("a cat, sitting")
    Image.new("L", (16, 16), 200).save(place / "a.mask.png")
    (place / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a dog"}\n')
    for ending in ("csv", "parquet"):
        other = folder / ending
        other.mkdir()
        Image.fromarray(made).save(other / "b.png")
        Image.new("L", (16, 16), 200).save(other / "b.mask.png")
        found.append(Seed("photos", other, other / f"metadata.{ending}"))
    found[0].file.write_text("file_name,text\nb.png,a dog\n")
    rows = pyarrow.Table.from_pylist([{"file_name": "b.png", "text": "a dog"}])
    pyarrow.parquet.write_table(rows, found[1].file)
    names = ("a.txt", "metadata.jsonl", "a.mask.png", "a.png")
    return [*found, *(Seed("photos", place, place / name) for name in names)]


def caches(folder):
    """Records of a data cache."""
    store = Store(folder / "moments.records")
    for i in range(3):
        store.put(key("moments", i), {"moments": np.full((2, 2, 8), i, np.float32)})
    return _alone("cache", folder / "moments.records")
