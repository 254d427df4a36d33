"""Checks before a run that settings, method, model, prompts and devices fit together; they raise ValueError.

settings = checks.worded(settings)                                fill in the method's word for the captions
checks.alone(settings); checks.microbatches(settings)            the settings alone
examples = checks.pictures(settings)                             the pictures
checks.class_pictures(settings, examples)                        the pictures of the class
checks.said_word(method, sd, data)                               the prompts
"""

import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdjax import conditions
from sdjax.data import batches, sources
from sdjax.data.sources.source import Examples
from sdjax.formats import controlnet
from sdjax.images import reading
from sdjax.methods.chain import Chain
from sdjax.methods.full import Full
from sdjax.methods.method import Method
from sdjax.runtime import mesh
from sdjax.settings import SettingError, prefixed
from sdjax.stable_diffusion import StableDiffusion
from sdjax.training import prompt_lines
from sdjax.training.settings import FORMS

OF_THE_LOSS = (  # settings of the diffusion loss
    "min_snr", "debiased", "huber", "noise_offset", "pyramid", "perturbation", "preserve", "clip_skip", "times",
    "zero_snr", "task", "data.mask", "data.chunks", "class_data.path",
)  # fmt: skip
LARGE = 512  # size in pixels for decoding pictures while the run's size is unknown


def worded(settings: Any) -> Any:
    """Returns the settings with data.word set to the method's word if it was ""."""
    words = getattr(settings.method, "words", ())
    if settings.data.word or not words:
        return settings
    return replace(settings, data=replace(settings.data, word=words[0]))


def alone(settings: Any) -> None:
    """Raises ValueError if the settings do not fit each other."""
    method = settings.method
    if Method not in type(method).__mro__:
        raise SettingError(
            "method", type(method).__name__, "a class that names sdjax.methods.method.Method as its base"
        )
    words = method.words
    if settings.data.word and words and not any(word in settings.data.word.split() for word in words):
        trained = ", ".join(map(repr, words))
        raise SettingError("data.word", settings.data.word, f"the word that the method trains: {trained} ('' takes it)")
    if method.loss is not None:
        usual = type(settings)()
        for get, name in ((operator.attrgetter(name), name) for name in OF_THE_LOSS):
            if (value := get(settings)) != get(usual):
                said = f"{get(usual) or 'none'}: {type(method).__name__} has its own loss, which ignores it"
                raise SettingError(name, value, said)
        if settings.fit:
            wanted = "'', with compute, remat and optim.kind instead"
            why = f"it estimates the memory of a UNet's training, not of {type(method).__name__}"
            raise SettingError("fit", settings.fit, wanted, why)
    if not settings.data.squares and method.look is not None:
        raise SettingError("data.buckets", settings.data.buckets, f"0: {type(method).__name__} reads square pictures")
    if settings.save_model_as != FORMS[0] and not set(method.formats) <= {controlnet.KIND}:
        said = f"{FORMS[0]}: {type(method).__name__} exports another file than a whole model or a ControlNet"
        raise SettingError("save_model_as", settings.save_model_as, said)
    lines = prompt_lines.read(settings.prompts_file) if settings.prompts_file else []
    if not method.condition and any(prompt_lines.CONTROL in line for line in lines):
        said = f"lines without --cn: {type(method).__name__} reads no condition"
        raise SettingError("prompts_file", settings.prompts_file, said)
    others = (method.loss, method.preview, settings.data.condition or None, settings.data.concept or None)
    if settings.judge and any(one is not None for one in others):
        raise SettingError("judge", settings.judge, "'': the previews are not pictures of prompts alone")
    if settings.data.concept and method.look is None:
        raise SettingError("data.concept", settings.data.concept, "'': only E4T reads a picture")
    parts = _parts(method)
    if method.condition and not settings.data.condition:
        raise SettingError(
            "data.condition", "", f"the condition that the method reads: {', '.join(conditions.known())}"
        )
    if settings.data.condition and not method.condition:
        said = f"'': {type(method).__name__} reads none, as ControlNet does"
        raise SettingError("data.condition", settings.data.condition, said)
    maker = settings.data.maker
    if settings.data.flip and maker is not None and not maker.mirrors:
        said = f"0 with data.condition={settings.data.condition!r}: its colours tell left from right"
        raise SettingError("data.flip", settings.data.flip, said)
    for part in (part for part in parts if isinstance(part, Full)):
        names = part.parts
        if "vae" in names or ("image_encoder" in names and len(parts) == 1):
            taught = "unet and text_encoder, and image_encoder beside E4T; an autoencoder learns by Vae"
            raise SettingError("method.parts", names, f"parts that the diffusion loss trains: {taught}")
    if settings.preserve and any(isinstance(part, Full) and not part.keep for part in parts):
        raise SettingError("preserve", settings.preserve, "0, or a Full with keep=True")


def pictures(settings: Any) -> Examples:
    """Returns the run's examples after checking them.

    Raises ValueError for missing or unreadable pictures, and for several pictures if the method needs exactly one.
    """
    examples = sources.open(settings.data)
    if settings.method.look is not None and not settings.data.concept and len(examples) != 1:
        raise SettingError(
            "data.path", settings.data.path,
            f"one picture, not {len(examples)}: this method reads one (or data.concept=same)",
        )  # fmt: skip
    examples.check(settings.data.size or LARGE)
    if isinstance(settings.data.validation, str) and settings.data.validation:
        try:
            sources.open(batches.measured(settings.data)).check(settings.data.size or LARGE)
        except ValueError as error:
            raise ValueError(f"data.validation: {error}") from None
    return examples


def class_pictures(settings: Any, examples: Examples) -> Examples | None:
    """Returns the checked examples of class_data.path; None without a path.

    Raises ValueError for a folder with fewer than class_data.count pictures and for class_data.rows that do not fit the
    batch.  Also if the loss needs class prompts but no prompt of `examples` has an identifier.
    """
    classes = settings.class_data
    if settings.preserve and classes.identifiers and not classes.changes(examples, batches.MOST):
        raise SettingError(
            "class_data.identifiers", classes.identifiers, "words of the subject's prompts, such as that of data.word",
            "no prompt contains one, so class and subject would share their prompts",
        )  # fmt: skip
    if classes.draw and not classes.path:
        raise SettingError("class_data.draw", True, "class_data.path with it: only train/run.py and the page draw")
    if not classes.path:
        return None
    with prefixed("class_data"):
        classes.rows_of(settings.data.batch)
        draws = "python -m sdjax class_images RECIPE with the same settings draws what it lacks"
        if not _pictures_in(classes.path):
            raise SettingError("path", classes.path, "a folder of pictures of the class", draws)
        others = sources.open(classes.data(settings.data))
        if len(others) < classes.count:
            raise SettingError("count", classes.count, f"at most {len(others)}, as {classes.path} has", draws)
    others.check(settings.data.size or LARGE)
    return others


def _pictures_in(path):
    """Returns whether a path can be opened; False for a folder without pictures."""
    place, source = Path(path), sources.matching(path)
    if source is not None and source.last and place.is_dir():
        return any(file.suffix.lower() in reading.SUFFIXES for file in place.rglob("*"))
    return source is not None


def said_word(method: Method, sd: StableDiffusion, data: Any) -> None:
    """Raises ValueError if no prompt contains the method's word, whose row would never train."""
    for word in method.words:
        if not data.mentions(sd.ids(word)):
            raise ValueError(
                f"data.word={data.data.word!r}: no prompt holds {word!r}, which the method trains; write it into the"
                f" captions, or set data.word={word} and data.templates=object"
            )


def microbatches(settings: Any) -> None:
    """Raises ValueError if the method needs the whole batch, or microbatches and devices do not divide it."""
    mesh.rows(settings.parallel, settings.data.batch)
    parts, method = settings.optim.accumulate, settings.method
    devices = mesh.count(settings.parallel)
    if parts > 1 and method.whole_batch:
        raise SettingError("optim.accumulate", parts, f"1: {type(method).__name__} needs the whole batch")
    if parts > 1 and settings.data.batch % (parts * devices):
        many = f"on {devices} device{'s' * (devices > 1)}"
        raise SettingError("optim.accumulate", parts, f"a number that {many} divides data.batch={settings.data.batch}")


def _parts(method):
    """Returns the methods of a Chain, or the method itself."""
    return method.parts if isinstance(method, Chain) else (method,)
