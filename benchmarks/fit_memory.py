"""Compiles training steps of Stable Diffusion 1.5 at 512 x 512 for one TPU chip and prints the memory they need.

    pip install libtpu
    python benchmarks/fit_memory.py lora dreambooth e4t_tune --out docs/fit_memory.json
    python benchmarks/fit_memory.py lora --set data.batch=4 remat=false

The chip is a TPU v5e, which the machine need not have.  Shapes are enough: no weights, nothing computed.  Memory is
arguments (weights, optimizer, batch), outputs and temporaries, without the outputs that reuse donated arguments; a GB
is 2^30 bytes.  A compilation takes a quarter of an hour on two cores and up to 10 GB.  With --effort -1 it takes a
tenth of the time and finds nearly the same memory.  --out keeps the file's other figures.
"""

import argparse
import datetime
import sys
import time
from pathlib import Path

import jax
import numpy as np
import shapes
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from published import added

from sdjax import settings, trees
from sdjax.runtime import aot
from sdjax.training import fit

TOPOLOGY = "v5e:2x2"
GIVEN = {
    "lora": ["fit=8GB", "model=random:sd15"],
    "dreambooth": ["fit=16GB", "model=random:sd15"],
    "e4t_tune": ["fit=16GB", "model=random:sd15", "vision=random:vit-h", *shapes.GIVEN["e4t_tune"]],
}


def measured(train, effort=0.0):
    """Compiles a run's step and returns its figures.  effort: the compiler's, -1 to 1."""
    device = aot.topology(TOPOLOGY)[0]
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    function, arguments, train, chosen, about = shapes.program(train)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    start = time.monotonic()
    lowered = jax.jit(function, donate_argnums=0).lower(*arguments)
    compiled = lowered.compile(compiler_options={"exec_time_optimization_effort": effort})
    found = aot.cost(compiled, aot.chip([device]))
    return {
        "bytes": found["total"],
        "GB": round(found["total"] / fit.GB, 3),
        **{
            name: found[name]
            for name in ("arguments", "temporaries", "aliased", "outputs", "flops", "moved", "seconds")
        },
        "trained": trees.count(arguments[0]["trained"]),
        "chosen": chosen,
        "effort": effort,
        "our account": round(about),
        "device": f"{device.device_kind}, one chip of {TOPOLOGY}",
        "compiled in s": round(time.monotonic() - start),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
    }


def main():
    """Compiles the recipes one after the other and prints each one's memory; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=sorted(GIVEN))
    parser.add_argument("--set", nargs="+", default=[], help="settings that replace the recipe's")
    parser.add_argument("--effort", type=float, default=0.0, help="the compiler's effort; -1 is ten times faster")
    parser.add_argument("--out", type=Path, help="a JSON file to add the figures to")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu describes the topology; nothing runs on it
    for name in options.recipes:
        train = settings.load(f"configs/{name}.py", [*GIVEN[name], "data.path=photo.png", *options.set])
        found = measured(train, options.effort)
        said = " ".join([name, *options.set])
        print(f"{said}: {found['GB']} GB, compiled in {found['compiled in s']} s", flush=True)
        if options.out:
            command = f"python benchmarks/fit_memory.py {name}" + f" --effort {options.effort:g}" * bool(options.effort)
            command += f" --set {' '.join(options.set)}" * bool(options.set)
            added(options.out, {said: {"command": command, **found}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
