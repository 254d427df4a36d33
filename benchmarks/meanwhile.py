"""Measures what compiling the sampler while the weights load saves: one after the other, and side by side in threads.

    python benchmarks/load_memory.py --stored float32 --keep outputs/sd15      writes a model of random weights, 4.3 GB
    python benchmarks/meanwhile.py outputs/sd15 --dtype bfloat16

Each way runs in its own process, first with an empty compile cache, then with a full one.  Times of a part are wall
seconds and, in brackets, processor seconds of its thread, without XLA's own threads.  The program is the whole sampler
for one picture; its shapes are known before any weight is read.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

WAYS = ("one after the other", "side by side")


def measure(options):
    """Prints the times of one way as JSON."""
    import jax
    import lowering

    from sdjax.formats import pipeline
    from sdjax.runtime import compile_cache

    compile_cache.keep(options.cache)
    jax.devices()
    parts = {}

    def clocked(name, act):
        wall, own = time.monotonic(), time.thread_time()
        made = act()
        parts[name] = f"{time.monotonic() - wall:.1f} ({time.thread_time() - own:.1f})"
        return made

    def load():
        clocked("load", lambda: jax.block_until_ready(pipeline.load(options.model, options.dtype)))

    def build():
        run, shapes = clocked("shapes", lambda: lowering.sampling(1, options.dtype))
        lowered = clocked("lower", lambda: run.lower(*shapes))
        clocked("compile", lowered.compile)

    wall, own = time.monotonic(), time.process_time()
    if options.way == WAYS[0]:
        load()
        build()
    else:
        aside = threading.Thread(target=build)
        aside.start()
        load()
        aside.join()
    whole = {"seconds": round(time.monotonic() - wall, 1), "processor": round(time.process_time() - own, 1)}
    print(json.dumps({**whole, **parts}))


def main():
    """Measures both ways, cold and warm; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("--dtype", default="bfloat16", help="type to load and to compute in")
    parser.add_argument("--times", type=int, default=1, help="number of rounds; also prints the machine's load")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return measure(options)
    for _ in range(options.times):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    command = [sys.executable, __file__, options.model, "--dtype", options.dtype]
                    command += ["--way", way, "--cache", cache]
                    made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    print(f"{way}, {kind}: {made.stdout.strip()}, load {os.getloadavg()[0]:.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
