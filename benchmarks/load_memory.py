"""Measures private memory while a model of Stable Diffusion 1.5's size loads: at most 1.2 times the weights' size.

    python benchmarks/load_memory.py [--shape sd15] [--stored float16] [--dtype float16] [--keep DIR]

The program writes random weights of the shape to a temporary folder (2.1 GB as float16) and loads them in a fresh
process.  That process prints its anonymous memory before loading and the peak while loading (RssAnon; mapped file pages
are not private).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

LIMIT = 1.2


def anonymous():
    """Returns this process's private memory, bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Samples the private memory every 2 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self):
        while True:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.002)


def measure(folder, dtype):
    """Loads the folder and prints memory and seconds as JSON."""
    import jax

    from sdjax.formats import pipeline

    jax.devices()
    before = anonymous()
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    sd = pipeline.load(folder, dtype)
    jax.block_until_ready(sd)
    seconds = time.perf_counter() - start
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(sd))
    print(json.dumps({"before": before, "peak": peak.bytes, "weights": weights, "seconds": seconds}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="sd15")
    parser.add_argument("--stored", default="float16", help="type in the files")
    parser.add_argument("--dtype", default="float16", help="type to load")
    parser.add_argument("--keep", help="folder for the model; if it exists, it is used as it is")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or os.path.join(temporary, "model")
        if not os.path.isdir(folder):
            from sdjax.formats import pipeline

            pipeline.save(pipeline.load(f"random:{options.shape}", options.stored), folder)
        command = [sys.executable, __file__, "--measure", folder, "--dtype", options.dtype]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
    ratio = found["peak"] / found["weights"]
    print(f"{options.shape}, stored as {options.stored}, loaded as {options.dtype}, in {found['seconds']:.1f} s")
    print(f"weights {found['weights'] / 1e9:.3f} GB; private memory before {found['before'] / 1e9:.3f} GB,")
    print(f"peak {found['peak'] / 1e9:.3f} GB = {ratio:.3f} of the weights (limit {LIMIT})")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
