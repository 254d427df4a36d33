"""What has to fit together before a run begins: settings, method, model, prompts and devices; a ValueError for each.

checks.known_word(settings); checks.microbatches(settings)       what settings alone tell
checks.model(settings, sd)                                       and the model
checks.said_word(method, sd, data)                               and the prompts
"""

import numpy as np

from sdjax.methods.chain import Chain
from sdjax.methods.full import Full
from sdjax.runtime import mesh


def known_word(settings):
    """Raises ValueError where captions call the subject by another word than the one that the method trains."""
    words = _words(settings.method)
    if settings.data.word and words and not any(word in settings.data.word.split() for word in words):
        raise ValueError(f"data.word={settings.data.word!r}: the method trains {', '.join(map(repr, words))}")


def said_word(method, sd, data):
    """Raises ValueError where no prompt holds the word that the method trains: its row would stay as it is."""
    for word in _words(method):
        if not data.mentions(np.asarray(sd.words[word])):
            raise ValueError(
                f"data.word={data.data.word!r}: no prompt holds {word!r}, which the method trains; write it into the"
                f" captions, or set data.word={word} and data.templates=object"
            )


def model(settings, sd):
    """Raises ValueError where the method, the loss and the model do not go together."""
    method, parts = settings.method, _parts(settings.method)
    if hasattr(method, "loss"):
        for name, value in (("min_snr", settings.min_snr), ("noise_offset", settings.noise_offset),
                            ("data.mask", settings.data.mask)):  # fmt: skip
            if value:
                raise ValueError(f"{name}={value}: {type(method).__name__} has a loss of its own that knows no such")
    else:
        unet, vae = sd.networks.unet.config, sd.networks.vae.config
        if sd.text_encoder is None or unet.in_channels != vae.latent_channels:
            raise ValueError(
                f"model={settings.model!r}: a UNet of {unet.in_channels} channels; the diffusion loss is for those that"
                f" take words and a latent of {vae.latent_channels}, not for inpainting and upscaling"
            )
    for names in (part.parts for part in parts if isinstance(part, Full)):
        if "vae" in names or ("image_encoder" in names and len(parts) == 1):
            raise ValueError(
                f"method.parts={names}: the diffusion loss teaches unet and text_encoder, and image_encoder beside E4T;"
                " an autoencoder learns by Vae"
            )
    if settings.data.concept and not any(hasattr(part, "look") for part in parts):
        raise ValueError(f"data.concept={settings.data.concept!r}: only E4T looks at a picture; accepted is ''")


def microbatches(settings):
    """Raises ValueError where the method needs the whole batch, or microbatches and devices do not divide it."""
    parts, method = settings.optim.accumulate, settings.method
    devices = mesh.count(settings.parallel)
    if parts > 1 and getattr(method, "whole_batch", False):
        raise ValueError(f"optim.accumulate={parts}: {type(method).__name__} needs the whole batch; use 1")
    if parts > 1 and settings.data.batch % (parts * devices):
        raise ValueError(
            f"optim.accumulate={parts}: on {devices} device{'s' * (devices > 1)} does not divide"
            f" data.batch={settings.data.batch}"
        )


def _parts(method):
    """Returns the methods of a Chain, or the method."""
    return method.parts if isinstance(method, Chain) else (method,)


def _words(method):
    """Returns the words that a method trains."""
    return [part.word for part in _parts(method) if hasattr(part, "word")]
