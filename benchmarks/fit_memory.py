"""Bytes that a training step of Stable Diffusion 1.5 at 512 x 512 needs on one TPU chip, by the compiler's account.

    pip install libtpu
    python benchmarks/fit_memory.py lora dreambooth e4t_tune --out docs/fit_memory.json
    python benchmarks/fit_memory.py lora --set data.batch=4 remat=false

Each recipe is compiled for a chip of a TPU v5e, on a machine without one, from shapes alone: no weights, nothing
computed.  Its bytes are those of the arguments (weights, optimizer, batch) and of the temporaries, less what is
donated; a GB is 2^30 of them.  A compilation takes a quarter of an hour of two cores and up to 10 GB.  Other figures in
FILE stay.
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sdjax import settings, trees
from sdjax.formats import pipeline
from sdjax.formats.storage import parameters
from sdjax.tasks.text2img import TextToImage
from sdjax.training import fit, optim, step

SIZE, LENGTH, TOPOLOGY = 512, 77, "v5e:2x2"
S = jax.ShapeDtypeStruct
# The built-in vocabulary beside shapes without weights holds letters alone, so words are letters here.
GIVEN = {
    "lora": ["fit=8GB", "model=random:sd15"],
    "dreambooth": ["fit=16GB", "model=random:sd15"],
    "e4t_tune": ["fit=16GB", "model=random:sd15", "init=''", "vision=random:vit-h", "method.parts.0.domain=a"],
}


def abstract(network, dtype):
    """Returns the shapes of a network's parameters."""
    return jax.tree.map(lambda leaf: S(leaf.shape, jnp.dtype(dtype)), parameters.template(network))


def program(train):
    """Returns (the step's function, its arguments as shapes, the settings, what was chosen) of a run's settings."""
    train, chosen = fit.typed(train), ""
    with mock.patch.object(parameters, "random_parameters", abstract):
        sd = pipeline.load("random:sd15", "float32", vision=train.vision or None)
    sd = sd.with_dtype(train.compute, remat=train.remat)

    def begin(sd, pixels):
        with jax.ensure_compile_time_eval():  # first weights of some methods are drawn on the host
            trained, frozen = train.method.split(sd, jax.random.key(0))
        frozen = trees.cast(frozen, train.frozen)
        frozen = frozen if train.method.look is None else train.method.look(frozen, trained, pixels)
        return trained, frozen

    trained, frozen = jax.eval_shape(begin, sd, S((SIZE, SIZE, 3), jnp.float32))
    if train.fit:
        train, chosen = fit.fitted(train, trained, frozen, SIZE)
        frozen = frozen.with_dtype(train.compute, remat=train.remat)
    tx, evaluate = optim.optimizer(train.optim, train.steps)
    state = jax.eval_shape(lambda trained: step.initial_state(trained, tx, train.ema), trained)
    shapes = {"ids": ((LENGTH,), jnp.int32), "index": ((), jnp.int32), "weight": ((), jnp.float32)}
    shapes["moments"] = ((SIZE // 8, SIZE // 8, 8), jnp.float32)
    if train.preserve and train.class_data.identifiers:
        shapes["class_ids"] = shapes["ids"]
    batch = {name: S((train.data.batch, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    batch |= {name: {"text_encoder": ids} for name, ids in batch.items() if name.endswith("ids")}
    about = fit.bytes_of(train, trained, frozen, SIZE)
    return step.of_run(train, tx, evaluate, TextToImage()), (state, frozen, batch), train, chosen, about


def measured(train):
    """Returns the figures of a run's step."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    function, arguments, train, chosen, about = program(train)
    arguments = jax.tree.map(lambda x: S(x.shape, x.dtype, sharding=place), arguments)
    start = time.monotonic()
    memory = jax.jit(function, donate_argnums=0).lower(*arguments).compile().memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "bytes": kept + memory.temp_size_in_bytes,
        "GB": round((kept + memory.temp_size_in_bytes) / fit.GB, 3),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "trained": trees.count(arguments[0]["trained"]),
        "chosen": chosen,
        "our account": round(about),
        "device": f"{device.device_kind}, one chip of {TOPOLOGY}",
        "compiled in s": round(time.monotonic() - start),
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
    }


def main():
    """Compiles the recipes one after the other and prints, or writes, what each needs; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=sorted(GIVEN))
    parser.add_argument("--set", nargs="+", default=[], help="settings in place of the recipe's")
    parser.add_argument("--out", type=Path, help="a JSON file that gets the figures")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu describes the topology; nothing runs on it
    for name in options.recipes:
        train = settings.load(f"configs/{name}.py", [*GIVEN[name], "data.path=photo.png", *options.set])
        found = measured(train)
        said = " ".join([name, *options.set])
        print(f"{said}: {found['GB']} GB, compiled in {found['compiled in s']} s", flush=True)
        if options.out:
            figures = json.loads(options.out.read_text()) if options.out.exists() else {}
            command = f"python benchmarks/fit_memory.py {name}" + (
                f" --set {' '.join(options.set)}" * bool(options.set)
            )
            figures[said] = {"command": command, **found}
            options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
