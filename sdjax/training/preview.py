"""Pictures during training, with fixed seeds: what the run has learned so far."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data.prompts import NAME
from sdjax.images import grid
from sdjax.methods.e4t import look
from sdjax.methods.method import Method
from sdjax.sampling import generate
from sdjax.stable_diffusion import StableDiffusion, to_pictures

SEEDS, STEPS = 4, 20


def prompts(settings: Any) -> tuple[str, ...]:
    """Returns a run's prompts; "[name]" in them is the subject's word, one after the other of several.

    Words that are for the negative prompt, method.unwanted, are not said here.
    """
    method = settings.method
    words = tuple(word for word in method.words if word not in method.unwanted)
    if method.unwanted:
        names = words or ("a face",)
    else:
        names = words if len(words) > 1 else (settings.data.word,)
    wanted = settings.prompts or tuple(f"a photo of {name or 'a face'}" for name in names)
    return tuple(dict.fromkeys(text.replace(NAME, name) for text in wanted for name in names))


def sheet(method: Method, sd: StableDiffusion, data: Any, settings: Any) -> np.ndarray | None:
    """Returns a labelled sheet uint8 [height width 3]: prompts by seeds; None where there is nothing to see.

    A method with previews of its own shows those, a row each.  Where the data show an encoder its subjects
    (data.concept), a row each: the subject, then a picture per prompt.
    """
    texts = prompts(settings)
    if method.preview is not None:
        rows = method.preview(sd, data[0])
        return grid.sheet(list(rows.values()), list(rows)) if rows else None
    if settings.data.concept:
        subjects = data[0]["concept"][:SEEDS]
        rows = [(*to_pictures(x[None]), *_pictures(look(sd, x), texts, [0] * len(texts))) for x in subjects]
        return grid.sheet(rows, columns=("subject", *texts))
    unwanted = ", ".join(method.unwanted)
    rows = [list(_pictures(sd, [text] * SEEDS, range(SEEDS), unwanted)) for text in texts]
    return grid.sheet(rows, texts, [f"seed {seed}" for seed in range(SEEDS)])


def write(path: Path, method: Method, sd: StableDiffusion, data: Any, settings: Any) -> np.ndarray | None:
    """Writes the sheet as a PNG and returns it; None where there is nothing to see.

    Pictures that cannot be made are said, and are not the end of a run.
    """
    try:
        made = sheet(method, sd, data, settings)
    except ValueError as error:
        print(f"preview: no {path.name}: {error}")
        return None
    if made is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made).save(path)
    return made


def _pictures(sd, prompts, seeds, unwanted=""):
    return generate.text2img(sd, list(prompts), seeds=seeds, steps=STEPS, negative_prompt=unwanted)
