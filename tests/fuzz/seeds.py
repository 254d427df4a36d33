"""Valid files of every kind that the readers take; each loads undamaged.

seeds = make(folder)          # list of Seed

Adapters are files of torch, diffusers and peft that foreign.py has written; the rest is made here, in small shapes.
"""

import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from fuzz.networks import autoencoders, controlnets, critics, encoders, ports, tasks
from fuzz.seed import Seed, alone, small
from PIL import Image, PngImagePlugin

import sdjax
from sdjax.data.batches import Data
from sdjax.data.store import Store, key
from sdjax.formats.models import single_file
from sdjax.formats.storage import pickle_writer
from sdjax.formats.storage.tensor_file import TensorFile
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.sampling.settings import TextToImage
from sdjax.service import records
from sdjax.training import begin, checkpoint, optim, run_folder, step
from sdjax.training.settings import Train

FOREIGN = Path(__file__).parents[1] / "data" / "fuzz"


def make(folder: Path) -> list[Seed]:
    """Writes the seeds into a folder and returns them."""
    found = []
    for kind in (
        adapters, embeddings, hypernetworks, models, controlnets, autoencoders, encoders, ports, critics, tasks, runs,
        lists, pictures, folders, caches,
    ):  # fmt: skip
        place = folder / kind.__name__
        if (FOREIGN / kind.__name__).is_dir():
            shutil.copytree(FOREIGN / kind.__name__, place)
        place.mkdir(parents=True, exist_ok=True)
        found += kind(place)
    return found


def adapters(folder):
    """LoRAs of sd-scripts, diffusers and PEFT; LoHa, LoKr and DoRA with the names of LyCORIS and PEFT."""
    places = sorted(path for path in folder.iterdir() if path.is_dir())
    inner = [Seed("attach", place, path) for place in places for path in sorted(place.iterdir())]
    return [*alone("attach", *sorted(path for path in folder.iterdir() if path.is_file())), *inner]


def embeddings(folder):
    """Textual inversions of A1111 (both containers and a picture), diffusers and sd-scripts."""
    return alone("attach", *sorted(folder.iterdir()))


def hypernetworks(folder):
    """A1111's hypernetworks, in both containers."""
    return alone("attach", *sorted(folder.iterdir()))


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
    """Converts a torch.save archive to the older container: pickles, then the count and numbers of each tensor."""
    with zipfile.ZipFile(archive) as old:
        program = old.read("archive/data.pkl")
        names = sorted(name for name in old.namelist() if "/data/" in name)
        content = {name.rpartition("/")[2]: old.read(name) for name in names}
    heads = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    rows = b"".join(struct.pack("<q", len(data) // 2) + data for data in content.values())  # of float16
    start = b"".join(pickle.dumps(head, 2) for head in heads)
    path.write_bytes(start + program + pickle.dumps(list(content), 2) + rows)


def runs(folder):
    """A run's folder with one checkpoint, as after the first step."""
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
    return alone("list", *sorted(folder.iterdir()))


def pictures(folder):
    """Pictures with our records and with A1111's, masks, and plain pictures in several formats."""
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
        *alone("record", *own),
        *alone("picture", *drawn),
        *alone("mask", *(p for p in drawn if "mode" in p.name)),
    ]


def folders(folder):
    """A folder of training pictures with captions, metadata and masks, and a folder for each other metadata format."""
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
    return alone("cache", folder / "moments.records")
