"""Estimates `make pocket` on a GPU, without one: the cost of a row in each stage, and how many rows a GPU trains.

    python benchmarks/pocket_plan.py [--work outputs/pocket-work] [--flops 790e12] [--bytes 4.3e12] [--minutes 9]

FLOPs come from the step's program before XLA changes it, bytes moved from the program compiled for this machine.  Both
are a full batch's, divided by its rows; no step runs.

--work: a folder of runs on this machine; the table also shows their measured rows per second.
--flops, --bytes: what the GPU reaches per second in large products and copies.
--share: the share of both that networks as small as these reach (our guess).
"""

import argparse
import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import make_pocket

from sdjax import settings
from sdjax.runtime import compile_cache
from sdjax.training import optim
from sdjax.training.begin import begin, task_of
from sdjax.training.step import initial_state, of_run

STARTING = 0.7  # minutes of a stage before its first step: imports, pictures, compilation (our guess)


def cost(stage, make):
    """Returns (rows, FLOPs per row, bytes per row, temporary GB) of a full step, for pictures of the usual side."""
    program, *given = make_pocket.run_of(make, stage)
    few = [
        f"model={make_pocket.SHAPE}",
        "data.count=16",
        "data.cache=''",
        "data.workers=0",
        "data.batch=16",
        "minutes=1",
    ]
    plain = ["data.large=0", "data.buckets=0", "data.size=0"] if stage.sizes else []
    run = settings.load(program, [*given, *few, *plain])
    trained, frozen, data, _ = begin(run)
    tx, evaluate = optim.optimizer(run.optim, run.steps, run.minutes)
    rows = stage.rows
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), data[0])
    state = jax.eval_shape(lambda trained: initial_state(trained, tx, run.ema), trained)
    step = jax.jit(of_run(run, tx, evaluate, task_of(run, frozen)))
    lowered = step.lower(state, frozen, batch)
    compiled = lowered.compile()
    moved, room = compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes
    return rows, lowered.cost_analysis()["flops"] / rows, moved / rows, room / 1e9


def measured(work, stage):
    """Returns a run's rows per second between its first and last logged step; None with fewer than two."""
    path = Path(work) / stage.name / "metrics.jsonl"
    if not path.exists():
        return None
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
    if len(rows) < 2:
        return None
    batch = json.loads((path.parent / "config.json").read_text())["data"]["batch"]
    first, last = rows[0], rows[-1]
    return batch * (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="outputs/pocket-work")
    parser.add_argument("--flops", type=float, default=790e12)
    parser.add_argument("--bytes", type=float, default=4.3e12)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--minutes", type=float, default=9.0)
    options = parser.parse_args()
    make = make_pocket.Make(minutes=options.minutes, compute="bfloat16")  # a GPU's default
    compile_cache.keep()
    heads = [
        "stage",
        "rows",
        "GFLOP a row",
        "MB a row",
        "GB",
        "here: rows, GFLOP a second",
        "GPU: rows a second, steps, rows",
    ]
    print("|", " | ".join(heads), "|\n|", " | ".join(["---"] * len(heads)), "|")
    for stage in make_pocket.STAGES:
        rows, flops, moved, room = cost(stage, make)
        rate = options.share * min(options.flops / flops, options.bytes / moved)
        seconds = 60 * max(0.0, options.minutes * stage.share - STARTING)
        here = measured(options.work, stage)
        seen = "not measured" if here is None else f"{here:.1f}, {here * flops / 1e9:.0f}"
        gpu = f"{rate:,.0f}, {rate * seconds / rows:,.0f}, {rate * seconds / 1e6:.2f} M"
        print(
            f"| {stage.name} | {rows} | {flops / 1e9:.2f} | {moved / 1e6:.0f} | {room:.0f} | {seen} | {gpu} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
