"""Compiles a training step for a TPU, on a machine without one, and prints memory, time and traffic of each chip.

    make aot TOPOLOGY=v5e:2x2 CONFIG=configs/e4t_pretrain.py MODEL=random:sd15
    python benchmarks/aot.py configs/lora.py data.batch=32 --model random:tiny --out docs/aot.json
    python benchmarks/aot.py configs/e4t_pretrain.py --model random:tiny --growth --out docs/aot.json

CONFIG and settings are as for train/run.py.  Shapes are enough: the program loads no weights and no pictures, and
computes nothing.  It needs libtpu, in its own environment, because libtpu changes a CPU's flags.  The compiler's effort
is low by default, which gives nearly the same memory about ten times sooner; --effort 0 is the compiler's default.
Times are lower bounds, from the roofline.  --growth: the same rows per chip on 4, 16, 64 and 256 chips.
"""

import argparse
import datetime
import sys
import time
from pathlib import Path

import jax
import shapes
from published import added

from sdjax import settings, trees
from sdjax.runtime import aot, mesh

GROWTH = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
TOWER = "random:vit-h"  # replaces an image encoder from the hub
TYPES = ["compute=bfloat16", "frozen=bfloat16"]


def parser():
    """Returns the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("config", help="a recipe")
    made.add_argument("settings", nargs="*", help="a.b=value, replaces the recipe's")
    made.add_argument("--model", default="random:sd15", help="random:NAME")
    made.add_argument("--topology", default="v5e:2x2")
    made.add_argument("--rows", type=int, help="rows per chip; default: the recipe's batch")
    made.add_argument("--fsdp", type=int, help="chips that share the weights; default: all of a slice")
    made.add_argument("--slices", type=int, default=1, help="slices of the topology, joined by a slower network")
    made.add_argument("--effort", type=float, default=-1.0, help="the compiler's effort, -1 to 1")
    made.add_argument("--growth", action="store_true", help=f"on {', '.join(GROWTH)}")
    made.add_argument("--out", type=Path, help="a JSON file to add the figures to")
    return made


def read(options):
    """Returns the settings of a run on a model of shapes; TOWER replaces the recipe's image encoder from the hub."""
    name = str(Path(options.config).with_suffix("")).partition("configs/")[2]
    given = [f"model={options.model}", "data.path=photo.png", *TYPES, *shapes.GIVEN.get(name, [])]
    plain = settings.load(options.config, [*given, *options.settings])
    full = options.model not in ("random:tiny", "random:pocket")
    tower = TOWER if full and (plain.vision or name.startswith("e4t")) else ""
    return settings.load(options.config, [*given, f"vision={tower}", *options.settings])


def measure(train, topology, rows, fsdp=None, effort=-1.0, slices=1):
    """Compiles a step of `rows` rows per chip for `slices` slices of a topology; returns its figures."""
    devices = aot.topology(topology, slices)
    fsdp = len(devices) // slices if fsdp is None else fsdp
    grid = mesh.meshed({"data": len(devices) // fsdp, "fsdp": fsdp, "tensor": 1}, devices)
    function, given, train, chosen, _ = shapes.program(shapes.with_rows(train, rows * len(devices)))
    place, run = mesh.on(grid, function, rows * len(devices))
    state, frozen, batch = place.state(given[0]), place.frozen(given[1]), place.batch(given[2])
    start = time.monotonic()
    lowered = run.lower(state, frozen, batch)
    middle = time.monotonic()
    compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": effort})
    found = aot.cost(compiled, aot.chip(devices))
    return {
        "topology": topology,
        "slices": slices,
        "chips": len(devices),
        "chip": devices[0].device_kind,
        "rows per chip": rows,
        "fsdp": fsdp,
        **found,
        "trained": trees.count(state["trained"]),
        "chosen": chosen,
        "effort": effort,
        "lowered in s": round(middle - start, 1),
        "compiled in s": round(time.monotonic() - middle, 1),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
    }


def said(name, one):
    """Returns the figures of a step as lines of text."""
    gigabytes = {part: one[part] / 1e9 for part in ("arguments", "temporaries", "total", "moved", "sent")}
    return (
        f"{name}, {one['chips']} x {one['chip']}, {one['rows per chip']} rows a chip, "
        f"compiled in {one['compiled in s']} s\n"
        f"  memory    {gigabytes['arguments']:.3f} GB of arguments, {gigabytes['temporaries']:.3f} of temporaries, "
        f"{gigabytes['total']:.3f} in all: {'fits' if one['fits'] else 'does not fit'}\n"
        f"  compute   {one['flops'] / 1e12:.4f} TFLOP, {1e3 * one['seconds_flops']:.2f} ms\n"
        f"  moved     {gigabytes['moved']:.4g} GB, {1e3 * one['seconds_moved']:.2f} ms\n"
        f"  sent      {gigabytes['sent']:.4g} GB to other chips, {1e3 * one['seconds_sent']:.2f} ms\n"
        f"  roofline  {1e3 * one['seconds']:.2f} ms, {one['rows per chip'] / one['seconds']:.0f} rows a second a chip"
    )


def main(arguments=None):
    """Compiles the steps, prints and keeps their figures; returns the exit status, 1 if a step does not fit."""
    options = parser().parse_intermixed_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # libtpu describes the topology; nothing runs on it
    train = read(options)
    fits = True
    for topology in GROWTH if options.growth else (options.topology,):
        rows = options.rows or train.data.batch
        one = measure(train, topology, rows, options.fsdp, options.effort, options.slices)
        name = " ".join([Path(options.config).stem, options.model, *options.settings, topology])
        name += f" x {options.slices}" * (options.slices > 1)
        print(said(name, one), flush=True)
        command = f"python benchmarks/aot.py {' '.join(sys.argv[1:] if arguments is None else arguments)}"
        if options.out:
            added(options.out, {name: {"command": command, **one}})
        fits &= bool(one["fits"])
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
