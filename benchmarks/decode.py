"""Measures how many pictures a core reads, decodes and resizes per second.

    python benchmarks/decode.py                       # a Markdown table
    python benchmarks/decode.py --seconds 1

The pictures are JPEGs of smooth noise (quality 90), with a row for each size and a column for each source.  The program
resizes and crops them to 512 x 512 as a run does.  One thread works at a time, and the figure counts processor seconds,
so other programs change it little.
"""

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdjax.data import sources
from sdjax.data.batches import Data

SIDES, COUNT = (512, 1024, 2048), 64


def picture(seed: int, side: int) -> bytes:
    """Returns the bytes of a JPEG: noise of 1/8 of the side, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side // 8, side // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def folder(place: Path, pictures: list[bytes]) -> Path:
    """Writes a folder of pictures."""
    for i, data in enumerate(pictures):
        (place / f"{i}.jpg").write_bytes(data)
    return place


def shard(place: Path, pictures: list[bytes]) -> Path:
    """Writes a tar shard."""
    with tarfile.open(place / "a.tar", "w:") as file:
        for i, data in enumerate(pictures):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return place


def table(place: Path, pictures: list[bytes]) -> Path:
    """Writes a parquet file of one row group."""
    pq.write_table(pa.table({"image": pa.array(pictures, pa.binary())}), place / "a.parquet")
    return place


def rate(path: Path, seconds: float) -> float:
    """Returns a source's pictures per processor second."""
    data = Data(path=str(path), size=512, word="a", crop="random", flip=0.5)
    examples, random = sources.open(data), np.random.default_rng(0)
    for i in range(min(len(examples), 4)):
        examples.example(i, 512, random)
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        examples.example(int(random.integers(len(examples))), 512, random)
        count += 1
    return count / (time.process_time() - start)


def main(arguments: list[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="processor time for each figure")
    seconds = parser.parse_args(arguments).seconds
    print("| JPEG | KB | " + " | ".join(make.__name__ for make in (folder, shard, table)) + " |\n" + "| --- " * 5 + "|")
    for side in SIDES:
        pictures, cells = [picture(i, side) for i in range(COUNT)], []
        for make in (folder, shard, table):
            with tempfile.TemporaryDirectory() as place:
                os.environ["SDJAX_DATA"] = f"{place}/index"
                (Path(place) / "data").mkdir()
                cells.append(f"{rate(make(Path(place) / 'data', pictures), seconds):.0f}")
        print(f"| {side} x {side} | {np.mean([len(data) for data in pictures]) / 1e3:.0f} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
