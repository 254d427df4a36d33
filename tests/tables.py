"""Pictures in tables and shards, written as their tools write them: parquet, Arrow streams, tar."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def photo(seed, size=(40, 48), kind="PNG"):
    """Returns the bytes of a picture of noise, `size` (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def shard(path, examples, end=True):
    """Writes a tar shard of [{member name: bytes}, ...], with Python's tarfile."""
    with tarfile.open(path, "w:") as file:
        for members in examples:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def table(pictures, **columns):
    """Returns a table with "image" as Hugging Face's `Image` feature stores it."""
    image = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)],
                     pa.struct([("bytes", pa.binary()), ("path", pa.string())]))  # fmt: skip
    features = {"image": {"_type": "Image"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"image": image, **columns}).replace_schema_metadata(about)


def parquet(path, pictures, group=2, **columns):
    """Writes a parquet file with row groups of `group` rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(pictures, **columns), path, row_group_size=group)
    return path
