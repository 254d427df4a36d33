"""Builds training steps from shapes alone: no weights, no pictures, nothing computed.

function, arguments, train, chosen, account = program(settings.load("configs/lora.py", [*GIVEN["lora"], ...]))
"""

from dataclasses import replace
from unittest import mock

import embedded
import jax
import jax.numpy as jnp

from sdjax import tasks, trees
from sdjax.formats import pipeline
from sdjax.formats.storage import parameters
from sdjax.tasks.text2img import TextToImage
from sdjax.training import fit, optim, step

S = jax.ShapeDtypeStruct
# The built-in vocabularies of random models have few words, or only letters, so words are letters here.
GIVEN = {
    "e4t_pretrain": ["method.domain=a"],
    "e4t_tune": ["init=''", "method.parts.0.domain=a"],
    "pocket/tune": ["init=''", "method.parts.0.domain=a"],
    "pocket/e4t": ["init=''", "method.parts.0.domain=a"],
}


def abstract(network, dtype):
    """Returns the shapes of a network's parameters."""
    return jax.tree.map(lambda leaf: S(leaf.shape, jnp.dtype(dtype)), parameters.template(network))


def load(model, dtype="float32", **options):
    """Returns a model "random:NAME" with shapes instead of weights."""
    with mock.patch.object(parameters, "random_parameters", abstract):
        return pipeline.load(model, dtype, **options)


def program(train):
    """Returns (the step's function, its arguments as shapes, the settings, fit='s choices, its estimate in bytes)."""
    train, chosen = fit.typed(train), ""
    loaded = load(train.model, vision=train.vision or None)
    task = TextToImage() if train.method.loss is not None else tasks.of(loaded, train.task)
    size = train.data.size or embedded.side(loaded)

    def begin(parts, pixels):
        with jax.ensure_compile_time_eval():  # first weights of some methods are drawn on the host
            sd = task.prepare(loaded.replace(parts=parts), jax.random.key(0))
            sd = sd.with_dtype(train.compute, remat=train.remat)
            trained, frozen = train.method.split(sd, jax.random.key(0))
        frozen = trees.cast(frozen, train.frozen)
        single = train.method.look is not None and not train.data.concept
        return trained, train.method.look(frozen, trained, pixels) if single else frozen

    trained, frozen = jax.eval_shape(begin, loaded.parts, S((size, size, 3), jnp.float32))
    if train.fit:
        train, chosen = fit.fitted(train, trained, frozen, size)
        frozen = frozen.with_dtype(train.compute, remat=train.remat)
    tx, evaluate = optim.optimizer(train.optim, train.steps)
    state = jax.eval_shape(lambda trained: step.initial_state(trained, tx, train.ema), trained)
    account = fit.bytes_of(train, trained, frozen, size)
    return (
        step.of_run(train, tx, evaluate, task),
        (state, frozen, batch(train, loaded, task, size)),
        train,
        chosen,
        account,
    )


def batch(train, sd, task, size):
    """Returns the shapes of a run's batch, as sdjax/data/batches.py makes it."""
    encode = train.data.encode and not (train.method.pixels or task.pixels)
    side, channels = size // sd.factor, sd.networks["vae"].config.latent_channels
    shapes = {"index": ((), jnp.int32), "weight": ((), jnp.float32)}
    shapes["moments" if encode else "pixels"] = ((side, side, 2 * channels) if encode else (size, size, 3), jnp.float32)
    if train.data.concept:
        shapes["concept"] = (size, size, 3), jnp.float32
    if train.data.mask:
        shapes["mask"] = (side, side, 1), jnp.float32
    rows = train.data.batch
    made = {name: S((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    ids = {encoder: S((rows, len(row)), jnp.int32) for encoder, (row,) in sd.tokenize([""]).items()}
    made |= {"ids": ids, **({"class_ids": ids} if train.preserve and train.class_data.identifiers else {})}
    return made | ({"control": {"hint": S((rows, size, size, 3), jnp.float32)}} if train.data.condition else {})


def with_rows(train, rows):
    """Returns the settings with another batch size."""
    return replace(train, data=replace(train.data, batch=rows))
