"""What a run's checkpoints hold, written for others as the run itself does at its end: python -m sdjax.convert RUN DST.

write("outputs/full", "cat", step=400, weights="raw")     # or "outputs/full/checkpoints/400"

Nothing in the run's folder is written, so a run that still trains can be looked at.  What was frozen is not in a
checkpoint: model, pictures and init of the run's config.json must lie where they lay, as for a run that goes on.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from sdjax.data.batches import Data
from sdjax.formats.storage import files
from sdjax.methods.chain import Chain
from sdjax.methods.clip import Clip
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.methods.vae import Vae
from sdjax.runtime import compile_cache
from sdjax.settings import from_json
from sdjax.training import optim, results
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.loop import Train, begin, initial_state
from sdjax.training.optim import Optim

METHODS = (Full, TextualInversion, E4T, Vae, Clip, Chain)
CLASSES = {kind.__name__: kind for kind in (Train, Data, Optim, *METHODS)}  # all that a run's config.json may name
WEIGHTS = ("ema", "raw")


def write(source, destination, step=None, weights=None):
    """Writes what a run would have exported at a checkpoint; returns (path, step).

    source: RUN or RUN/checkpoints/STEP.  step: of the checkpoint; None for the newest whole one.
    weights: "ema" or "raw"; None for those that the run exports, its moving average where it has one.
    Raises ValueError for a folder that is no run, a step or weights that it has not, another base model, and when no
    checkpoint is whole.
    """
    found = results.run_of(source)
    if found is None:
        raise ValueError(f"{source}: neither a run's folder nor one of its checkpoints")
    run, named = found
    if None not in (step, named) and step != named:
        raise ValueError(f"step={step}: {source} is that of step {named}")
    settings = read(run)
    averaged = settings.ema > 0 if weights is None else weights == "ema"
    if weights not in (*WEIGHTS, None):
        raise ValueError(f"weights={weights!r}: accepted are {', '.join(WEIGHTS)}")
    if averaged and not settings.ema:
        raise ValueError(f"weights='ema': {run} kept no moving average (ema=0); accepted is raw")
    method = settings.method
    wanted = _checkpoints(run, named if step is None else step)
    trained, frozen, data, base = begin(settings, pictures=False)
    state = _restored(wanted, settings, trained, base)
    tree = state["ema"] if averaged else state["trained"]
    if hasattr(method, "finish"):
        frozen, tree = method.finish(frozen, tree, data)
    return results.write(method, frozen, tree, destination), int(state["step"])


def read(run):
    """Returns the settings in a run's config.json.  Raises ValueError for what a run does not write."""
    path = Path(run) / "config.json"
    try:
        settings = from_json(files.read_json(path), CLASSES)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None
    if not isinstance(settings, Train) or not isinstance(settings.method, METHODS):
        raise ValueError(f"{path}: holds no settings of a run")
    return settings


def _checkpoints(run, step):
    """Returns the folders of a run's checkpoints, or of that of `step` alone."""
    steps = {int(path.name): path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()}
    if not steps:
        raise ValueError(f"{run}: has no checkpoint yet")
    if step is not None and step not in steps:
        raise ValueError(f"step={step}: {run} has no such checkpoint; there are {', '.join(map(str, sorted(steps)))}")
    return [path for n, path in sorted(steps.items()) if step in (None, n)]


def _restored(folders, settings, trained, base):
    """Returns the state of the newest of these checkpoints that is whole."""
    run = folders[0].parents[1]
    tx = optim.transform(settings.optim, settings.steps)
    like = jax.eval_shape(lambda trained: initial_state(trained, tx, settings.ema), trained)
    with tempfile.TemporaryDirectory() as folder:  # a manager tidies up where it reads, so it gets a folder of its own
        for path in folders:
            (Path(folder) / path.name).symlink_to(path.absolute())
        checkpoints = Checkpoints(Path(folder))
        try:
            state = checkpoints.restore(like, base)
        except ValueError as error:
            raise ValueError(f"{run}: its config.json does not name what it began with: {error}") from None
        finally:
            checkpoints.close()
    if state is None:
        raise ValueError(f"{run}: no checkpoint of {', '.join(path.name for path in folders)} is whole")
    return jax.tree.map(jnp.asarray, state)


def main(arguments):
    """Writes what a run learned; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sdjax.training.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("destination", metavar="DST")
    parser.add_argument("--step", type=int)
    parser.add_argument("--weights", choices=WEIGHTS)
    options = parser.parse_args(arguments)
    try:
        found = results.run_of(options.run)
        # as train/run.py does: what a method computes at the start must come out as it did
        compile_cache.keep(steps=read(found[0]).steps if found else None)
        path, step = write(options.run, options.destination, options.step, options.weights)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"wrote {path}, step {step} of {options.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
