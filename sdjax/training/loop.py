"""The training loop: one program for every method.

    data = Data(path="photos/cat", word="<cat>", templates="object")
    train(Train(model="pocket", method=TextualInversion(word="<cat>"), data=data), out)

Order of a run: model, split, data, optimizer, checkpoint (the newest whole one, else `init`, else fresh), steps,
export.  Run again with the same folder, it goes on from the newest checkpoint, to the same bits.
"""

import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.diffusion.loss import diffusion_loss
from sdjax.formats import pipeline
from sdjax.methods.clip import CLIP
from sdjax.methods.full import Full
from sdjax.runtime import locks, mesh, processes
from sdjax.settings import BELOW_1, FROM_0, FROM_1, SEED, check
from sdjax.training import checks, preview, results
from sdjax.training.checkpoint import Checkpoints
from sdjax.training.log import Log
from sdjax.training.optim import Optim, check_rates, moving_average, norm, rate, transform
from sdjax.training.run import check_folder, write_settings

BEFORE_STOP = 143  # exit status after SIGTERM, as shells count it: 128 + 15
DTYPES = ("float32", "bfloat16")
CHECKED = ("loss", "gradient", "update")  # the metrics of a step that must be finite; the latter two are norms


@dataclass(frozen=True)
class Train:
    """A run's settings.

    model: "pocket", a diffusers folder, a single file, a hub id or a built-in shape ("random:tiny").
    vision: a folder with an image encoder for a model that has none.
    init: a file or folder to start the trained weights from.
    seed: of the first weights, the order of the pictures, noise and times.  parallel: single, pmap, mesh or
    mesh:data=N,fsdp=M.  out: the run's folder; "" for outputs/NAME of the recipe.
    ema: decay of the moving average of the trained weights, 0 for none.  compute, frozen: "float32" or "bfloat16".
    remat: compute activations a second time in place of keeping them.
    min_snr: gamma of min-SNR weighting, 0 for none.  noise_offset: deviation of a constant in each channel's noise.
    checkpoint, preview, log: every so many steps, 0 for never (a SIGTERM still saves).  keep: so many checkpoints.
    prompts: of the previews.
    """

    model: str = "pocket"
    vision: str = ""
    method: object = field(default_factory=Full)
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
    checkpoint: int = 500
    keep: int = 3
    log: int = 10
    preview: int = 0
    prompts: tuple[str, ...] = ()

    def __post_init__(self):
        check(
            self, steps=FROM_0, seed=SEED, ema=BELOW_1, compute=DTYPES, frozen=DTYPES,
            min_snr=FROM_0, noise_offset=FROM_0, checkpoint=FROM_0, keep=FROM_1,
            log=FROM_0, preview=FROM_0,
        )  # fmt: skip


def make_step(method, tx, root, *, loss=None, accumulate=1, ema=0.0):
    """Returns the pure step(state, frozen, batch, axis=None) -> (state, metrics).

    state: {"step", "trained", "opt"[, "ema"]}.  loss(frozen, trained, batch, key, step, axis) -> (scalar, metrics) is
    the method's own where it has one, else `loss`.  The gradient is the mean over `accumulate` equal microbatches.
    metrics: the loss's own, "loss", and "gradient" and "update", the norms of all gradients and of all changes: both
    are finite only where all of the new weights are, if the old ones were.
    """
    loss = getattr(method, "loss", loss)

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
        new = {"step": state["step"] + 1, "trained": trained, "opt": opt}
        if ema:
            new["ema"] = moving_average(state["ema"], trained, ema, state["step"])
        return new, metrics

    return step


def initial_state(trained, tx, ema=0.0):
    """Returns the state before the first step; `trained` is copied, since the state is donated."""
    own = trees.copy(trained)
    state = {"step": jnp.int32(0), "trained": own, "opt": jax.jit(tx.init)(trained)}
    return {**state, "ema": trees.copy(trained)} if ema else state


def default_loss(method, settings):
    """Returns the diffusion loss of a method's joined model, with the run's weighting."""

    def loss(frozen, trained, batch, key, step, axis=None):
        sd = method.join(frozen, trained, trees.named_key(key, "join"))
        return diffusion_loss(
            sd, batch, key, step, min_snr=settings.min_snr or None, noise_offset=settings.noise_offset
        )

    return loss


def begin(settings, pictures=True):
    """Returns (trained, frozen, data, base) as they are before a run's first step; base: a digest of model,
    init and the one picture of the run.

    pictures: False leaves data None where the method itself does not ask for them.
    Raises ValueError for settings that do not fit each other or the model, and for a model, a file or pictures that
    are not there.
    """
    method = settings.method
    checks.known_word(settings)
    vision = {"vision": settings.vision} if settings.vision else {}
    loaded = pipeline.load(settings.model, **vision)  # float32, from which training starts whatever `frozen` is
    if loaded.conditioners:
        raise ValueError(f"model={settings.model!r}: was tuned on one picture already; give the model it came from")
    checks.model(settings, loaded)
    sd = loaded.with_dtype(settings.compute, remat=settings.remat)
    trained, frozen = method.split(sd, trees.named_key(jax.random.key(settings.seed), "split"))
    if settings.init:
        trained, frozen = results.start(method, trained, frozen, settings.init)
    model, frozen = _digest(settings, loaded), _rounded(frozen, settings.frozen)
    del loaded, sd  # gigabytes, where `frozen` is now something else
    data = picture = None
    if pictures or hasattr(method, "look") or hasattr(method, "finish"):
        wanted = replace(settings.data, encode=False) if getattr(method, "pictures", False) else settings.data
        data = batches.build(wanted, frozen, settings.seed)
        checks.said_word(method, frozen, data)
    if hasattr(method, "look") and data.single is not None:
        picture = data.single
        frozen = method.look(frozen, trained, picture)
    return trained, frozen, data, trees.digest((model, trained if settings.init else None, picture))


def _digest(settings, sd):
    """Returns the digest of the model that a run starts from, as it was loaded.

    The random weights of a new model are left out, since their last bits depend on the device; its name stands for
    them.
    """
    new = settings.model.startswith("new:")
    return trees.digest((settings.model, sd.image_encoder if settings.vision else None, sd.reference) if new else sd)


def _rounded(frozen, dtype):
    """Returns what does not train with weights in `dtype`; what CLIP's training left stays, as a load leaves it."""
    kept = {name: tree for name, tree in (frozen.reference or {}).items() if name == CLIP}
    rounded = trees.cast(frozen, dtype)
    return rounded.replace(reference={**rounded.reference, **kept}) if kept else rounded


def train(settings, out):
    """Runs a config to its last step in the folder `out`, going on where its checkpoints end; returns the joined model.

    Writes config.json origin.json metrics.jsonl checkpoints/ samples/ export/.
    Raises ValueError for settings that do not fit and where another process has the folder or this one is one of
    several, FloatingPointError at a loss, gradient or update that is not finite
    (nothing is written over the last good checkpoint, and no export), SystemExit(143) after SIGTERM, with a checkpoint
    written.
    """
    processes.check_alone("training")
    with locks.held(out):
        return _train(settings, Path(out))


def _train(settings, out):
    """Runs a config in a folder that this process has; see train."""
    method = settings.method
    checks.microbatches(settings)
    trained, frozen, data, base = begin(settings)
    check_rates(settings.optim, trained)
    print(f"data: {data.source.about()}")
    tx = transform(settings.optim, settings.steps)
    state, numbers = initial_state(trained, tx, settings.ema), trees.count(trained)
    del trained  # the state has a copy, and a large model fits once
    place, run = mesh.compile(_step(settings, tx), settings.parallel, settings.data.batch)
    checkpoints, state = _resumed(out, settings, state, base)
    state, fixed = place.state(state), place.frozen(frozen)

    def learned(state):
        return place.gather(state)["ema" if settings.ema else "trained"]

    start = int(place.gather(state)["step"])
    print(f"{type(method).__name__}: {numbers:,} numbers trained, {trees.count(frozen):,} frozen; "
          f"{'resumed at step ' + str(start) if start else 'from the start'}; in {out}")  # fmt: skip
    log = Log(out, start, settings.steps, out.name)
    stop = _Stop()
    previous, schedule = None, rate(settings.optim, settings.steps)
    try:
        for n, batch in zip(range(start, settings.steps), data.iterate(start), strict=False):
            state, metrics = run(state, fixed, place.batch(batch))
            _finite(previous)  # one step late, so that the device never waits
            previous, stopped, last = (n + 1, metrics), stop.asked, n + 1 == settings.steps
            saves = stopped or _due(n + 1, settings.checkpoint, last)
            logs, shows = _due(n + 1, settings.log, last), _due(n + 1, settings.preview)
            if saves or logs or shows or last:
                _finite(previous)  # what waits for the device anyway: nothing is written of a step that went wrong
            if saves:
                checkpoints.save(place.gather(state), base, wait=stopped)
            if stopped:
                log.event(n + 1, "stopped")
                raise SystemExit(BEFORE_STOP)
            if logs:
                log.metrics(n + 1, {**metrics, "rate": schedule(n)})
            log.advance(n + 1)
            if shows:
                seen = method.join(frozen, learned(state))
                preview.write(out / "samples" / f"{n + 1:07d}.png", method, seen, data, settings)
    finally:
        stop.release()
        checkpoints.wait()
        checkpoints.close()
        log.close()
    weights = learned(state)
    if hasattr(method, "finish"):
        frozen, weights = method.finish(frozen, weights, data)
    result = results.write(method, frozen, weights, out / "export")
    print(f"result: {result}{results.advice(frozen, result)}")
    return method.join(frozen, weights)


def _step(settings, tx):
    """Returns the step of these settings, which trains with `tx`."""
    key = trees.named_key(jax.random.key(settings.seed), "steps")
    loss, optim = default_loss(settings.method, settings), settings.optim
    return make_step(settings.method, tx, key, loss=loss, accumulate=optim.accumulate, ema=settings.ema)


def _resumed(out, settings, state, base):
    """Returns (Checkpoints of the run's folder, the newest whole state there, else `state`); writes its settings."""
    check_folder(out, settings, base)
    checkpoints = Checkpoints(out / "checkpoints", settings.keep)
    found = checkpoints.restore(state, base)
    if found is None and checkpoints.damaged:  # a new start would go over what they led to
        raise ValueError(
            f"out={str(out)!r}: none of its checkpoints can be read ({', '.join(sorted(checkpoints.damaged))}); choose"
            " another out=DIR, or move them away to start anew"
        )
    write_settings(out, settings, base)
    return checkpoints, state if found is None else jax.tree.map(jnp.asarray, found)


def _due(step, every, last=False):
    """Returns whether something that happens every so many steps, 0 for never, happens after this one."""
    return every > 0 and (last or step % every == 0)


def _finite(pair):
    """Raises FloatingPointError where the (step, metrics) have a loss, gradient or update that is not finite."""
    for name in CHECKED if pair else ():
        value = float(pair[1][name])
        if not np.isfinite(value):
            said = f"the {name} of step {pair[0]} is {value if name == 'loss' else 'not finite'}"
            raise FloatingPointError(f"{said}; the last good checkpoint is untouched; a lower optim.lr may help")


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
