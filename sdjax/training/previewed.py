"""The prompts of a run's previews, and the pictures of its data that they start from.

texts = prompts(settings, data)                       # ("a photo of <cat>",)
for one in starts(sd, data, settings): one.draw([one.caption], seeds=[0], steps=20)
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import tasks
from sdjax.data.batches import Batches
from sdjax.data.prompts import CAPTION, NAME, TEMPLATES, fill, read
from sdjax.methods.e4t import look
from sdjax.sampling import generate, inpainting, upscaling
from sdjax.sampling.control import taken
from sdjax.stable_diffusion import StableDiffusion, to_pictures
from sdjax.tasks.inpainting import Inpainting
from sdjax.tasks.task import tiles
from sdjax.tasks.upscaling import Upscaling

MOST = 4  # pictures of the data that previews start from
CAPTIONS, LOOKED_AT = 2, 64  # default prompts, and captions searched for different ones


@dataclass(frozen=True)
class Start:
    """What a preview starts from besides a prompt.

    shown: {label: picture uint8 [H W 3]} to show beside the result.  caption: the picture's own.
    draw(prompts, **settings): returns pictures uint8 [B H W 3].
    """

    shown: dict[str, Any]
    caption: str
    draw: Callable[..., Any]


def prompts(settings: Any, data: Any = None) -> tuple[str, ...]:
    """Returns a run's prompts with the subject's word for "[name]"; with several words, each prompt for each word.

    Words for the negative prompt, method.unwanted, are left out.  Without settings.prompts, the prompts are "a photo
    of" the words that the method trains; without such words, the first of data.templates or, if it holds a caption, the
    first CAPTIONS different captions.
    data: the run's Batches.
    """
    method = settings.method
    words = tuple(word for word in method.words if word not in method.unwanted)
    if not settings.prompts and not method.words:
        return _first(settings.data, data)
    if method.unwanted:
        names = words or ("a face",)
    else:
        names = words if len(words) > 1 else (settings.data.word,)
    wanted = settings.prompts or tuple(f"a photo of {name}" for name in names)
    return tuple(dict.fromkeys(text.replace(NAME, name) for text in wanted for name in names))


def asked(settings: Any) -> bool:
    """Returns whether the prompts are the user's or name a word, so that they fit all pictures of the data."""
    return bool(settings.prompts or settings.method.words or CAPTION not in _template(settings.data))


def _first(told, data):
    """Returns the prompts of a run without words of its own: of its template or its first captions."""
    if CAPTION not in _template(told):
        return (fill(_template(told), told.word),)
    source, random = data.source, np.random.default_rng(0)
    found = dict.fromkeys(source.caption(i, random) for i in range(min(len(source), LOOKED_AT)))
    return tuple(found)[:CAPTIONS]


def _template(told):
    """Returns the first template of a run's Data."""
    return (TEMPLATES[told.templates] if told.templates in TEMPLATES else read(told.templates))[0]


def starts(sd: StableDiffusion, data: Batches, settings: Any) -> list[Start]:
    """Returns the pictures of the first batch that previews start from, up to MOST; [] if prompts are enough.

    With data.condition: the conditions of a ControlNet.  With data.concept: the subjects of E4T's encoder.  Inpainting:
    pictures with a hole in their middle.  Upscaling: pictures made smaller.
    """
    make = _way(settings.data, sd)
    if make is None:
        return []
    quiet = copy.copy(data)
    quiet.data = replace(data.data, dropout=0.0, shuffle=False, tag_dropout=0.0)
    count = min(MOST, data.data.batch)
    captions = [quiet.seen(row)["caption"] for row in range(count)]
    return [Start(shown, caption, draw) for caption, (shown, draw) in zip(captions, make(sd, data[0]), strict=False)]


def _way(told, sd):
    """Returns the function (sd, batch) -> pairs (shown, draw) of a run's Data and task; None if prompts are enough."""
    if told.condition:
        return _conditions
    if told.concept:
        return _subjects
    return {Inpainting: _holes, Upscaling: _small}.get(type(tasks.of(sd)))


def _conditions(sd, batch):
    sd, (control,) = taken(sd)
    for hint in np.asarray(np.round(255 * batch["control"]["hint"]), np.uint8):
        yield {"condition": hint}, functools.partial(_controlled, sd, control, hint)


def _controlled(sd, control, hint, prompts, control_image=None, size=None, **given):
    """Returns the pictures of a ControlNet.  control_image: a condition in place of the hint, uint8 [H W 3]."""
    control = control.on(hint if control_image is None else control_image)
    return generate.text2img(sd, prompts, control=control, size=size or hint.shape[:2], **given)


def _subjects(sd, batch):
    for x in batch["concept"]:
        yield {"subject": to_pictures(x[None])[0]}, functools.partial(generate.text2img, look(sd, x))


def _holes(sd, batch):
    for picture in to_pictures(batch["pixels"]):
        height, width = picture.shape[:2]
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : -(height // 4), width // 4 : -(width // 4)] = 255
        shown = np.where(mask[..., None] > 0, np.uint8(127), picture)
        yield {"given": shown}, functools.partial(inpainting.inpaint, sd, pictures=picture, masks=mask)


def _small(sd, batch):
    pixels = jnp.asarray(batch["pixels"])
    for picture, small in zip(to_pictures(pixels), to_pictures(tiles(pixels, sd.factor)), strict=True):
        large = small.repeat(sd.factor, 0).repeat(sd.factor, 1)
        yield {"given": large, "picture": picture}, functools.partial(_enlarged, sd, small)


def _enlarged(sd, small, prompts, size=None, **given):
    """Returns the pictures of an upscaler; size: of the result."""
    size = None if size is None else tuple(side // sd.factor for side in size)
    return upscaling.upscale(sd, prompts, small, size=size, **given)
