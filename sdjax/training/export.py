"""Exports a run's checkpoints like the run itself at its end: python -m sdjax.convert RUN DST.

write("outputs/full", "cat", step=400, weights="raw")     # or "outputs/full/checkpoints/400"

The run's folder does not change, so this works while the run trains.  Checkpoints do not contain frozen weights: the
model, pictures and init in the run's config.json must still exist unchanged.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from sdjax import methods
from sdjax.data import sources
from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.formats.storage import files
from sdjax.methods.method import Method
from sdjax.runtime import members
from sdjax.runtime.guard import named
from sdjax.settings import CLASS, from_json, names
from sdjax.training import facts, judged, optim, run_folder
from sdjax.training.begin import begin
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import initial_state
from sdjax.training.unrounded import unrounded

WEIGHTS = ("ema", "raw")
WORLD = ("count", "domain", "looks", "named")  # the drawn world's settings; runs of 0.1 have them in Data


def write(
    source: str | Path,
    destination: str | Path,
    step: int | None = None,
    weights: str | None = None,
    told: Train | None = None,
) -> tuple[Path, int]:
    """Writes the export of a run at a checkpoint; returns (path, step).

    source: RUN or RUN/checkpoints/STEP.  step: the checkpoint; None is the best one of a run with `best`, otherwise
    the newest complete one.
    told: the run's settings, if already read.
    weights: "ema" or "raw"; None is the moving average if the run has one.
    Raises ValueError if the folder is not a run's, the step or weights do not exist, the base model changed, or no
    checkpoint is complete.
    """
    folder, asked = _place(source)
    if None not in (step, asked) and step != asked:
        raise ValueError(f"step={step}: {source} is step {asked}")
    told = read(folder) if told is None else told
    averaged = told.ema > 0 if weights is None else weights == "ema"
    if weights not in (*WEIGHTS, None):
        raise ValueError(f"weights={weights!r}: accepted are {', '.join(WEIGHTS)}")
    if averaged and not told.ema:
        raise ValueError(f"weights='ema': {folder} kept no moving average (ema=0); accepted is raw")
    method = told.method
    step = asked if step is None else step
    if step is None and told.best and (best := judged.best_of(folder, told.best)):
        step = best[0]
    wanted = _checkpoints(folder, step)
    with named(folder / "config.json", "cannot be started again"):
        trained, frozen, data, base = begin(told, pictures=False, fresh=False)
    state, evaluate = _restored(wanted, told, trained, base)
    tree = state["ema"] if averaged else evaluate(state["opt"], state["trained"])
    if method.finish is not None:
        frozen, tree = method.finish(frozen, tree, data)
    step = int(state["step"])
    said = facts.told(told, folder, step, frozen, tree)
    path, _ = run_folder.export(method, unrounded(frozen, told), tree, destination, **said)
    return path, step


def settings_of(source: str | Path, recipe: str | None = None) -> Train:
    """Returns the settings of a run, given its folder or one of its checkpoints; see read."""
    return read(_place(source)[0], recipe)


def _place(source):
    """Returns (folder of the run, step or None)."""
    found = run_folder.run_of(source)
    if found is None:
        raise ValueError(f"{source}: neither a run's folder nor one of its checkpoints")
    return found


def read(folder: str | Path, recipe: str | None = None) -> Train:
    """Returns the settings in a run's config.json.  recipe: a Python file with the method's class, which is executed.

    Raises ValueError for content that a run does not write.
    """
    path, own = Path(folder) / "config.json", names(recipe).values() if recipe else ()
    classes = {kind.__name__: kind for kind in (Train, Data, ClassData, Optim)}
    classes |= {**methods.known(), **sources.known(), **members.of(own, Method)}
    with named(path):
        found = from_json(_moved(files.read_json(path)), classes)
    if not isinstance(found, Train) or Method not in type(found.method).__mro__:
        raise ValueError(f"{path}: holds no settings of a run")
    return found


def _moved(values):
    """Returns a run's JSON with the drawn world's settings in their present place, data.source."""
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, dict) or "source" in data:
        return values
    world = {name: data[name] for name in WORLD if name in data}
    source = {CLASS: "Pocketland", **world} if data.get("path") == "pocketland" else None
    return {**values, "data": {**{name: x for name, x in data.items() if name not in WORLD}, "source": source}}


def _checkpoints(folder, step):
    """Returns the folders of a run's checkpoints, or only the folder of `step`."""
    steps = {int(path.name): path for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()}
    if not steps:
        raise ValueError(f"{folder}: has no checkpoint yet")
    if step is not None and step not in steps:
        raise ValueError(
            f"step={step}: {folder} has no such checkpoint; there are {', '.join(map(str, sorted(steps)))}"
        )
    return [path for n, path in sorted(steps.items()) if step in (None, n)]


def _restored(folders, settings, trained, base):
    """Returns (the state of the newest intact checkpoint of these, its optimizer's `evaluate`)."""
    place = folders[0].parents[1]
    tx, evaluate = optim.optimizer(settings.optim, settings.steps, settings.minutes)
    like = jax.eval_shape(lambda trained: initial_state(trained, tx, settings.ema), trained)
    with tempfile.TemporaryDirectory() as folder:  # a manager may change its folder, so it gets its own
        for path in folders:
            (Path(folder) / path.name).symlink_to(path.absolute())
        checkpoints = Checkpoints(Path(folder), tidy=False)
        try:
            state = checkpoints.restore(like, base)
        except ValueError as error:
            raise ValueError(f"{place}: config.json does not match the start of the run: {error}") from None
        finally:
            checkpoints.close()
    if state is None:
        raise ValueError(f"{place}: no checkpoint of {', '.join(path.name for path in folders)} is complete")
    return jax.tree.map(jnp.asarray, state), evaluate
