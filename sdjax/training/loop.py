"""The training loop: one program for every method.

    data = Data(path="photos/cat", word="<cat>", templates="object")
    train(Train(model="pocket", method=TextualInversion(word="<cat>"), data=data), out)

Order of a run: model, split, data, optimizer, checkpoint (the newest whole one, else `init`, else fresh), steps,
export.  Run again with the same folder, it goes on from the newest checkpoint, to the same bits.
"""

import functools
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from sdjax import tasks, trees
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.sources.source import Examples
from sdjax.diffusion.loss import diffusion_loss, preservation, snr_weight
from sdjax.formats import pipeline
from sdjax.formats.adapters import format as kinds
from sdjax.formats.storage.files import HUB_ID
from sdjax.methods.clip import CLIP
from sdjax.methods.full import Full
from sdjax.methods.method import Method
from sdjax.runtime import locks, mesh, processes
from sdjax.settings import BELOW_1, FROM_0, FROM_1, SEED, check, prefixed, to_json
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task
from sdjax.tasks.text2img import TextToImage
from sdjax.training import checks, log, preview, run
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.optim import Evaluate, Optim, as_trained, check_rates, moving_average, norm, optimizer, rate

BEFORE_STOP = 143  # exit status after SIGTERM, as shells count it: 128 + 15
DTYPES = ("float32", "bfloat16")
CHECKED = ("loss", "gradient", "update")  # the metrics of a step that must be finite; the latter two are norms


@dataclass(frozen=True)
class Train:
    """A run's settings.

    model: "pocket", a diffusers folder, a single file, a hub id or a built-in shape ("random:tiny").
    vision: a folder with an image encoder for a model that has none.  perceptual: LPIPS' files, for autoencoders.
    task: text2img, inpainting or upscaling; "" for what the model is for.  Another one widens the UNet.
    init: a file or folder to start the trained weights from.
    seed: of the first weights, the order of the pictures, noise and times.  parallel: single, pmap, mesh or
    mesh:data=N,fsdp=M.  out: the run's folder; "" for outputs/NAME of the recipe; with {picture} in it one for each.
    ema: decay of the moving average of the trained weights, 0 for none.  compute, frozen: "float32" or "bfloat16".
    remat: compute activations a second time in place of keeping them.
    min_snr: gamma of min-SNR weighting, 0 for none.  noise_offset: deviation of a constant in each channel's noise.
    preserve: weight of what the model said before, for a Full with keep=True.
    checkpoint, preview, log: every so many steps, 0 for never (a SIGTERM still saves).  keep: so many checkpoints.
    prompts: of the previews, "[name]" for the word; preview=None shows them every max(50, steps / 10) steps.
    wandb: a project of Weights & Biases that is told too.
    """

    model: str = "pocket"
    vision: str = ""
    perceptual: str = ""
    method: Any = field(default_factory=Full)
    task: str = ""
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    steps: int = 1000
    seed: int = 0
    parallel: str = "single"
    init: str = ""
    out: str = ""
    ema: float = 0.0
    compute: str = "float32"
    frozen: str = "float32"
    remat: bool = False
    min_snr: float = 0.0
    noise_offset: float = 0.0
    preserve: float = 0.0
    checkpoint: int = 500
    keep: int = 3
    log: int = 10
    preview: int | None = None
    prompts: tuple[str, ...] = ()
    wandb: str = ""

    def __post_init__(self):
        check(
            self, steps=FROM_0, seed=SEED, ema=BELOW_1, compute=DTYPES, frozen=DTYPES,
            min_snr=FROM_0, noise_offset=FROM_0, checkpoint=FROM_0, keep=FROM_1,
            log=FROM_0, preserve=FROM_0,
        )  # fmt: skip
        if self.preview is not None:
            check(self, preview=FROM_0)

    @property
    def previews(self) -> int:
        """Every so many steps there is a preview, 0 for never."""
        return (max(50, self.steps // 10) if self.prompts else 0) if self.preview is None else self.preview


def make_step(
    method: Method,
    tx: optax.GradientTransformation,
    root: Key[Array, ""],
    *,
    loss: Any = None,
    accumulate: int = 1,
    ema: float = 0.0,
    evaluate: Evaluate = as_trained,
) -> mesh.Step:
    """Returns the pure step(state, frozen, batch, axis=None) -> (state, metrics).

    state: {"step", "trained", "opt"[, "ema"]}.  loss(frozen, trained, batch, key, step, axis) -> (scalar, metrics) is
    the method's own where it has one, else `loss`.  The gradient is the mean over `accumulate` equal microbatches.
    metrics: the loss's own, "loss", and "gradient" and "update", the norms of all gradients and of all changes: both
    are finite only where all of the new weights are, if the old ones were.
    evaluate: of the optimizer; the moving average is of what it gives.
    """
    loss = loss if method.loss is None else method.loss

    def step(state, frozen, batch, axis=None):
        key = jax.random.fold_in(root, state["step"])

        def gradient(microbatch):
            same = jax.random.clone(key)  # examples fold their index in, so microbatches may share the step's key
            compute = jax.value_and_grad(
                lambda trained: loss(frozen, trained, microbatch, same, state["step"], axis), has_aux=True
            )
            (value, metrics), grads = compute(state["trained"])
            return {"loss": value, **metrics}, grads

        if accumulate == 1:
            metrics, grads = gradient(batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(part)), None), zero, parts)
            metrics, grads = jax.tree.map(lambda x: x / accumulate, total)
        if axis is not None:
            metrics, grads = jax.lax.pmean((metrics, grads), axis)
        updates, opt = tx.update(grads, state["opt"], state["trained"])
        metrics = {**metrics, "gradient": norm(grads), "update": norm(updates)}
        trained = jax.tree.map(lambda x, u: (x + u).astype(x.dtype), state["trained"], updates)
        trained = trained if method.project is None else method.project(trained)
        new = {"step": state["step"] + 1, "trained": trained, "opt": opt}
        if ema:
            new["ema"] = moving_average(state["ema"], evaluate(opt, trained), ema, state["step"])
        return new, metrics

    return step


def initial_state(trained: Any, tx: optax.GradientTransformation, ema: float = 0.0) -> dict[str, Any]:
    """Returns the state before the first step, to be donated; `trained`, a split's own copies, is part of it."""
    state = {"step": jnp.int32(0), "trained": trained, "opt": _begun(tx, trained)}
    return {**state, "ema": trees.copy(trained)} if ema else state


@functools.partial(jax.jit, static_argnums=0)
def _begun(tx, trained):
    """Returns the optimizer's first state, in buffers of its own."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tx.init(trained))


def default_loss(method: Method, settings: Any, task: Task = TextToImage()) -> Callable:
    """Returns the diffusion loss of a method's joined model on a task, with the run's weighting."""
    weighting = functools.partial(snr_weight, gamma=settings.min_snr) if settings.min_snr else None
    regularisers = (preservation(settings.preserve),) if settings.preserve else ()

    def loss(frozen, trained, batch, key, step, axis=None):
        sd = method.join(frozen, trained, trees.example_keys(trees.named_key(key, "join"), batch["index"]))
        told = task.inputs(sd, batch, trees.named_key(key, "task"))
        return diffusion_loss(
            sd, batch, key, step, weighting=weighting, regularisers=regularisers, told=told,
            noise_offset=settings.noise_offset,
        )  # fmt: skip

    return loss


def begin(
    settings: Train, pictures: bool = True, fresh: bool = True, examples: Examples | None = None
) -> tuple[Any, StableDiffusion, Any, str]:
    """Returns (trained, frozen, data, base) as they are before a run's first step; base: a digest of model,
    init and the one picture of the run.

    pictures: False leaves data None where the method itself does not ask for them.
    fresh: False leaves what is drawn at the start as shapes, for a checkpoint to fill.
    examples: what checks.pictures gave; None opens them.
    Raises ValueError for settings that do not fit each other or the model, and for a model, a file or pictures that
    are not there; pictures are looked through before the model is read.
    """
    settings = checks.worded(settings)
    checks.alone(settings)
    method, key = settings.method, jax.random.key(settings.seed)
    if examples is None and (pictures or method.look is not None or method.finish is not None):
        examples = checks.pictures(settings)
    # In float32, from which training starts whatever `frozen` is.
    loaded = pipeline.load(settings.model, vision=settings.vision or None, perceptual=settings.perceptual or None)
    if loaded.conditioners:
        raise ValueError(f"model={settings.model!r}: was tuned on one picture already; give the model it came from")
    task = task_of(settings, loaded)
    sd = task.prepare(loaded, trees.named_key(key, "task")) if method.loss is None else loaded
    opened = kinds.opened(_place(settings.init), sd) if settings.init else None
    sd = sd.with_dtype(settings.compute, remat=settings.remat)
    split = trees.named_key(key, "split")
    with prefixed("method"):
        trained, frozen = method.split(sd, split if fresh and opened is None else None)
    if opened is not None:
        trained, frozen = run.start(method, trained, frozen, settings.init, opened)
        trained = run.drawn(trained, method, sd, split)
    model, frozen = _digest(settings, loaded), _rounded(frozen, settings.frozen)
    del loaded, sd  # gigabytes, where `frozen` is now something else
    data = picture = None
    if examples is not None:
        kept = settings.data.encode and not (method.pixels or task.pixels)
        data = batches.build(replace(settings.data, encode=kept), frozen, settings.seed, examples)
        checks.said_word(method, frozen, data)
        if method.look is not None and data.single is not None:
            picture = data.single
            frozen = method.look(frozen, trained, picture)
    return trained, frozen, data, trees.digest((model, trained if settings.init else None, picture))


def task_of(settings: Train, sd: StableDiffusion) -> Task:
    """Returns the run's task: what the model is for where settings do not say; of a loss of its own text to image."""
    return tasks.of(sd, settings.task) if settings.method.loss is None else TextToImage()


def _place(init):
    """Returns the place of what a run starts from: a file, an adapter's folder, or a model's, here or on the hub."""
    if init == "pocket" or (not Path(init).exists() and HUB_ID.fullmatch(init)):
        return pipeline.locate(init)
    return Path(init)


def _digest(settings, sd):
    """Returns the digest of the model that a run starts from, as it was loaded.

    The random weights of a new model are left out, since their last bits depend on the device; its name stands for
    them.
    """
    new = settings.model.startswith("new:")
    return trees.digest(
        (settings.model, sd.parts["image_encoder"] if settings.vision else None, sd.reference) if new else sd
    )


def _rounded(frozen, dtype):
    """Returns what does not train with weights in `dtype`; what CLIP's training left stays, as a load leaves it."""
    kept = {name: tree for name, tree in (frozen.reference or {}).items() if name == CLIP}
    rounded = trees.cast(frozen, dtype)
    return rounded.replace(reference={**rounded.reference, **kept}) if kept else rounded


def train(settings: Train, out: str | Path) -> StableDiffusion:
    """Runs a config to its last step in the folder `out`, going on where its checkpoints end; returns the joined model.

    Writes config.json origin.json metrics.jsonl checkpoints/ samples/ export/.
    Raises ValueError for settings that do not fit and where another process has the folder or this one is one of
    several, FloatingPointError at a loss, gradient or update that is not finite
    (nothing is written over the last good checkpoint, and no export), SystemExit(143) after SIGTERM, with a checkpoint
    written.
    """
    processes.check_alone("training")
    with locks.held(out):
        return _train(checks.worded(settings), Path(out))


def _train(settings, out):
    """Runs a config in a folder that this process has; see train."""
    method = settings.method
    checks.alone(settings)
    checks.microbatches(settings)
    examples = checks.pictures(settings)
    print(f"{mesh.described(settings.parallel)}; {settings.data.path}: {examples.about()}", flush=True)
    trained, frozen, data, base = begin(settings, examples=examples)
    check_rates(settings.optim, trained)
    tx, evaluate = optimizer(settings.optim, settings.steps)
    numbers = trees.count(trained)
    state = initial_state(trained, tx, settings.ema)
    del trained  # it is the state's
    task = task_of(settings, frozen)
    place, advance = mesh.compile(_step(settings, tx, evaluate, task), settings.parallel, settings.data.batch)
    checkpoints, state = _resumed(out, settings, state, base, run.mark(examples))
    state, fixed = place.state(state), place.frozen(frozen)

    def learned(state):
        state = place.gather(state)
        return state["ema"] if settings.ema else evaluate(state["opt"], state["trained"])

    def show(step, state):
        seen = method.join(frozen, learned(state)).fold()
        picture = preview.write(out / "samples" / f"{step:07d}.png", method, seen, data, settings)
        if picture is not None:
            told.picture(step, "samples", picture)

    start = int(place.gather(state)["step"])
    print(f"{type(method).__name__}: {numbers:,} numbers trained, {trees.count(frozen):,} frozen; "
          f"{'resumed at step ' + str(start) if start else 'from the start'}; in {out}")  # fmt: skip
    told = log.Log(out, start, settings.steps, out.name, log.boards(out, settings.wandb, to_json(settings)))
    stop = _Stop()
    previous, schedule = None, rate(settings.optim, settings.steps)
    try:
        for n, batch in zip(range(start, settings.steps), data.iterate(start), strict=False):
            state, metrics = advance(state, fixed, place.batch(batch))
            loss = _finite(previous)  # one step late, so that the device never waits
            previous, stopped, last = (n + 1, metrics), stop.asked, n + 1 == settings.steps
            saves = stopped or _due(n + 1, settings.checkpoint, last)
            logs, shows = _due(n + 1, settings.log, last), _due(n + 1, settings.previews) and task.words
            if saves or logs or shows or last:
                _finite(previous)  # what waits for the device anyway: nothing is written of a step that went wrong
            if saves:
                checkpoints.save(place.gather(state), base, wait=stopped)
            if stopped:
                told.event(n + 1, "stopped")
                raise SystemExit(BEFORE_STOP)
            if logs:
                told.metrics(n + 1, {**metrics, "rate": schedule(n)})
            told.advance(n + 1, loss)
            if shows:
                show(n + 1, state)
    finally:
        stop.release()
        checkpoints.wait()
        checkpoints.close()
        told.close()
    return _finished(settings, frozen, learned(state), data, out)


def _finished(settings, frozen, weights, data, out):
    """Writes the export, says how it is used, and returns the joined model."""
    method = settings.method
    if method.finish is not None:
        frozen, weights = method.finish(frozen, weights, data)
    result, use = run.export(method, frozen, weights, out / "export")
    print("\n  ".join([f"result: {result}", *(line.replace("MODEL", settings.model) for line in use)]))
    return method.join(frozen, weights).fold()


def _step(settings, tx, evaluate, task):
    """Returns the step of these settings, which trains with `tx`."""
    key = trees.named_key(jax.random.key(settings.seed), "steps")
    loss, parts = default_loss(settings.method, settings, task), settings.optim.accumulate
    return make_step(settings.method, tx, key, loss=loss, accumulate=parts, ema=settings.ema, evaluate=evaluate)


def _resumed(out, settings, state, base, pictures):
    """Returns (Checkpoints of the run's folder, the newest whole state there, else `state`); writes its settings."""
    run.check_folder(out, settings, base)
    checkpoints = Checkpoints(out / "checkpoints", settings.keep)
    found = checkpoints.restore(state, base)
    if found is None and checkpoints.damaged:  # a new start would go over what they led to
        raise ValueError(
            f"out={str(out)!r}: none of its checkpoints can be read ({', '.join(sorted(checkpoints.damaged))}); choose"
            " another out=DIR, or move them away to start anew"
        )
    run.write_settings(out, settings, base, pictures)
    return checkpoints, state if found is None else jax.tree.map(jnp.asarray, found)


def _due(step, every, last=False):
    """Returns whether something that happens every so many steps, 0 for never, happens after this one."""
    return every > 0 and (last or step % every == 0)


def _finite(pair):
    """Returns the loss of (step, metrics), None of None.

    Raises FloatingPointError where the loss, the gradient or the update is not finite.
    """
    for name in CHECKED if pair else ():
        value = float(pair[1][name])
        if not np.isfinite(value):
            said = f"the {name} of step {pair[0]} is {value if name == 'loss' else 'not finite'}"
            raise FloatingPointError(f"{said}; the last good checkpoint is untouched; a lower optim.lr may help")
    return float(pair[1]["loss"]) if pair else None


class _Stop:
    """Remembers a SIGTERM until the step is over."""

    def __init__(self):
        self.asked = False
        try:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread, as in a web server: somebody else handles signals there
            self.before = None

    def _ask(self, *_):
        self.asked = True

    def release(self):
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
