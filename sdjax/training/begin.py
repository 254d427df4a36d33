"""The start of a run: the model, split into trained and frozen weights, and the batches.

trained, frozen, data, base = begin(settings)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax import tasks, trees
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.cache import Texts
from sdjax.data.sources.source import Examples
from sdjax.diffusion import noise_schedule
from sdjax.formats import pipeline
from sdjax.formats.adapters import kinds
from sdjax.formats.storage.files import HUB_ID
from sdjax.sampling.denoising import skipped
from sdjax.settings import SettingError, prefixed
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task
from sdjax.tasks.text2img import TextToImage
from sdjax.training import base, checks, run_folder
from sdjax.training.settings import Train


def begin(
    settings: Train, pictures: bool = True, fresh: bool = True, examples: Examples | None = None
) -> tuple[Any, StableDiffusion, Any, str]:
    """Returns (trained, frozen, data, base) before a run's first step.

    base: a digest of the model, init and, for a run on one picture, the picture.
    pictures: False leaves data None unless the method needs pictures.
    fresh: False leaves random initial weights as shapes, for a checkpoint to fill.
    examples: the result of checks.pictures; None opens them.
    Raises ValueError for settings that do not fit each other or the model, and for a missing model, file or picture.
    Pictures are checked before the model is read.
    """
    settings = checks.worded(settings)
    checks.alone(settings)
    method, key = settings.method, trees.seed_key(settings.seed)
    if examples is None and (pictures or method.look is not None or method.finish is not None):
        examples = checks.pictures(settings)
    others = None if examples is None else checks.class_pictures(settings, examples)
    loaded = base.load(settings)  # in float32, since training starts from it for every setting of `frozen`
    if loaded.conditioners:
        raise ValueError(f"model={settings.model!r}: was tuned on one picture; pass the model it came from")
    if method.loss is None:
        skipped(loaded, settings.clip_skip)
    loaded = _rescaled(loaded) if settings.zero_snr else loaded
    task = task_of(settings, loaded)
    sd = task.prepare(loaded, trees.named_key(key, "task")) if method.loss is None else loaded
    opened = kinds.opened(_place(settings.init), sd) if settings.init else None
    sd, brought = (sd, {}) if opened is None else _brought(sd, *opened)
    sd = sd.with_dtype(settings.compute, remat=settings.remat)
    split = trees.named_key(key, "split")
    with prefixed("method"):
        trained, frozen = method.split(sd, split if fresh and opened is None else None)
    if opened is not None:
        trained, frozen = run_folder.start(method, trained, frozen, settings.init, opened)
        trained = trees.cast(run_folder.drawn(trained, method, sd, split), "float32")  # a file may hold float16
    model, frozen = base.digest(settings, loaded), _rounded(frozen, settings.frozen)
    del loaded, sd  # frees gigabytes if `frozen` was rounded
    data = picture = None
    if examples is not None:
        classes = settings.class_data if settings.preserve else replace(settings.class_data, identifiers=())
        data = batches.build(shown(settings, task), frozen, settings.seed, examples, classes, others)
        data.texts = _texts(settings, frozen, trained) if task.words and method.loss is None else None
        checks.said_word(method, frozen, data)
        if method.look is not None and data.single is not None:
            picture = data.single
            frozen = method.look(frozen, trained, picture)
    started = ((trained, brought) if brought else trained) if settings.init else None
    return trained, frozen, data, trees.digest((model, started, picture))


def _rescaled(sd):
    """Returns sd with zero terminal SNR; raises SettingError if pure noise tells its network nothing."""
    if sd.schedule.prediction_type == "epsilon":
        said = (
            "False with prediction_type=epsilon, which pure noise gives away; a model that predicts v, such as SD 2.1"
        )
        raise SettingError("zero_snr", True, said)
    return sd.replace(schedule=noise_schedule.zero_snr(sd.schedule))


def _brought(sd, kind, adapter):
    """Returns (sd with the parts that a file adds, the added parts)."""
    more = kind.brings(adapter, sd)
    return more, {name: tree for name, tree in more.parts.items() if tree is not sd.parts.get(name)}


def _texts(settings, frozen, trained):
    """Returns the Texts that cache the text encoder's outputs; None without a cache or if the encoder trains."""
    if not settings.data.cache:
        return None
    skip = settings.clip_skip - 1

    def inputs(joined, ids):
        told = vars(joined.condition(ids, skip).unet)
        return {name: value for name, value in told.items() if value is not None}

    joined = settings.method.join(frozen, trained)
    ids = joined.tokenize([""])
    if joined.conditioners or trees.depends(lambda tree: inputs(settings.method.join(frozen, tree), ids), trained):
        return None
    parts = {name: tree for name, tree in joined.parts.items() if name.startswith("text_encoder")}
    acts = trees.depends(lambda hooks: inputs(joined.replace(hooks=hooks), ids), joined.hooks)
    hooks = joined.hooks if acts else ()  # hooks on the UNet only do not change texts
    types = [str(np.dtype(joined.networks[name].dtype)) for name in parts]
    encode = jax.jit(inputs)
    which = f"{trees.digest((parts, hooks))} {types}" + f" skip {skip}" * bool(skip)
    return Texts(lambda ids: encode(joined, ids), settings.data.cache, which)


def shown(settings: Train, task: Task) -> Data:
    """Returns the run's Data settings; `encode` is off if the method or task needs pixels."""
    encode = settings.data.encode and not (settings.method.pixels or task.pixels)
    return replace(settings.data, encode=encode)


def task_of(settings: Train, sd: StableDiffusion) -> Task:
    """Returns the run's task: settings.task, by default the model's; text to image if the method has its own loss."""
    return tasks.of(sd, settings.task) if settings.method.loss is None else TextToImage()


def _place(init):
    """Returns the local path of `init`: a file, or the folder of an adapter or model, perhaps from the hub."""
    if init != "pocket" and (Path(init).exists() or not HUB_ID.fullmatch(init)):
        return Path(init)
    return (None if init == "pocket" else kinds.fetched(init)) or pipeline.locate(init)


def _rounded(frozen, dtype):
    """Returns the frozen model with weights in `dtype`; CLIP's projection keeps its type, as after loading."""
    return trees.cast(frozen, dtype).with_reference(clip=frozen.reference.clip)
