"""What has to fit together before a run begins: settings, method, model, prompts and devices; a ValueError for each.

settings = checks.worded(settings)                                a word for the captions, where only the method has one
checks.alone(settings); checks.microbatches(settings)            what settings alone tell
examples = checks.pictures(settings)                             and the pictures
checks.model(settings, sd)                                       and the model
checks.said_word(method, sd, data)                               and the prompts
"""

from dataclasses import replace
from typing import Any

from sdjax.data import sources
from sdjax.data.sources.source import Examples
from sdjax.methods.chain import Chain
from sdjax.methods.full import Full
from sdjax.methods.method import Method
from sdjax.runtime import mesh
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

LARGE = 512  # pixels that pictures are decoded for where neither settings nor a model say a size yet


def worded(settings: Any) -> Any:
    """Returns the settings with the method's word in data.word, where that is "" and the method trains one."""
    words = getattr(settings.method, "words", ())
    if settings.data.word or not words:
        return settings
    return replace(settings, data=replace(settings.data, word=words[0]))


def alone(settings: Any) -> None:
    """Raises ValueError where settings do not fit each other, whatever the model."""
    method = settings.method
    if Method not in type(method).__mro__:
        raise SettingError(
            "method", type(method).__name__, "a class that names sdjax.methods.method.Method as its base"
        )
    words = method.words
    if settings.data.word and words and not any(word in settings.data.word.split() for word in words):
        trained = ", ".join(map(repr, words))
        raise SettingError("data.word", settings.data.word, f"what the method trains: {trained} ('' follows it)")
    if method.loss is not None:
        for name, value in (("min_snr", settings.min_snr), ("noise_offset", settings.noise_offset),
                            ("preserve", settings.preserve), ("task", settings.task),
                            ("data.mask", settings.data.mask)):  # fmt: skip
            if value:
                raise SettingError(name, value, f"none: {type(method).__name__} has a loss of its own, without it")
    if settings.data.concept and method.look is None:
        raise SettingError("data.concept", settings.data.concept, "'': only E4T looks at a picture")
    parts = _parts(method)
    for part in (part for part in parts if isinstance(part, Full)):
        names = part.parts
        if "vae" in names or ("image_encoder" in names and len(parts) == 1):
            taught = "unet and text_encoder, and image_encoder beside E4T; an autoencoder learns by Vae"
            raise SettingError("method.parts", names, f"what the diffusion loss teaches: {taught}")
    if settings.preserve and not any(isinstance(part, Full) and part.keep for part in parts):
        raise SettingError("preserve", settings.preserve, "0, or a Full with keep=True")


def pictures(settings: Any) -> Examples:
    """Returns the run's examples, looked through.

    Raises ValueError for pictures that are not there, that cannot be read, and for several where the method looks at
    one.
    """
    examples = sources.open(settings.data)
    if settings.method.look is not None and not settings.data.concept and len(examples) != 1:
        raise SettingError(
            "data.path", settings.data.path,
            f"one picture, not {len(examples)}: this method looks at one (or data.concept=same)",
        )  # fmt: skip
    examples.check(settings.data.size or LARGE)
    return examples


def said_word(method: Method, sd: StableDiffusion, data: Any) -> None:
    """Raises ValueError where no prompt holds the word that the method trains: its row would stay as it is."""
    for word in method.words:
        if not data.mentions(sd.words[word]):
            raise ValueError(
                f"data.word={data.data.word!r}: no prompt holds {word!r}, which the method trains; write it into the"
                f" captions, or set data.word={word} and data.templates=object"
            )


def microbatches(settings: Any) -> None:
    """Raises ValueError where the method needs the whole batch, or microbatches and devices do not divide it."""
    parts, method = settings.optim.accumulate, settings.method
    devices = mesh.count(settings.parallel)
    if parts > 1 and method.whole_batch:
        raise SettingError("optim.accumulate", parts, f"1: {type(method).__name__} needs the whole batch")
    if parts > 1 and settings.data.batch % (parts * devices):
        many = f"on {devices} device{'s' * (devices > 1)}"
        raise SettingError("optim.accumulate", parts, f"a number that {many} divides data.batch={settings.data.batch}")


def _parts(method):
    """Returns the methods of a Chain, or the method."""
    return method.parts if isinstance(method, Chain) else (method,)
