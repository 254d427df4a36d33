"""Pictures during training with fixed seeds, which show the progress of the run."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.data.batches import Batches
from sdjax.data.prompts import NAME
from sdjax.formats.storage import files
from sdjax.images import grid
from sdjax.methods.e4t import look
from sdjax.methods.method import Method
from sdjax.sampling import generate
from sdjax.sampling.control import taken
from sdjax.stable_diffusion import StableDiffusion, to_pictures
from sdjax.training import prompt_lines

SEEDS, STEPS = 4, 20
MOST, COLUMNS, LOOKED_AT = 16, 4, 64  # pictures on the data sheet, pictures per row, steps searched for buckets


def prompts(settings: Any) -> tuple[str, ...]:
    """Returns a run's prompts with the subject's word for "[name]"; with several words, each prompt for each word.

    Words for the negative prompt, method.unwanted, are left out.
    """
    method = settings.method
    words = tuple(word for word in method.words if word not in method.unwanted)
    if method.unwanted:
        names = words or ("a face",)
    else:
        names = words if len(words) > 1 else (settings.data.word,)
    wanted = settings.prompts or tuple(f"a photo of {name or 'a face'}" for name in names)
    return tuple(dict.fromkeys(text.replace(NAME, name) for text in wanted for name in names))


def sheet(method: Method, sd: StableDiffusion, data: Any, settings: Any, steps: int = STEPS) -> np.ndarray | None:
    """Returns a labelled sheet uint8 [height width 3], prompts by seeds; None if there are no pictures.

    steps: of the sampler.

    A method with its own previews shows these, one row each.  With data.concept, each row is a subject and then a
    picture per prompt; likewise for a ControlNet's conditions.
    """
    more = {"steps": steps, "clip_skip": settings.clip_skip}
    texts, drawn = prompts(settings), functools.partial(_pictures, **more)
    if method.preview is not None:
        rows = method.preview(sd, data[0])
        return grid.sheet(list(rows.values()), list(rows)) if rows else None
    if settings.data.condition:
        sd, (control,) = taken(sd)
        hints = [np.asarray(np.round(255 * hint), np.uint8) for hint in data[0]["control"]["hint"][:SEEDS]]
        rows = [(hint, *drawn(sd, texts, [0] * len(texts), control.on(hint), hint.shape[:2])) for hint in hints]
        return grid.sheet(rows, columns=("condition", *texts))
    if settings.data.concept:
        subjects = data[0]["concept"][:SEEDS]
        rows = [(*to_pictures(x[None]), *drawn(look(sd, x), texts, [0] * len(texts))) for x in subjects]
        return grid.sheet(rows, columns=("subject", *texts))
    unwanted = ", ".join(method.unwanted)
    rows = [list(drawn(sd, [text] * SEEDS, range(SEEDS), unwanted=unwanted)) for text in texts]
    return grid.sheet(rows, texts, [f"seed {seed}" for seed in range(SEEDS)])


def write(path: Path, method: Method, sd: StableDiffusion, data: Any, settings: Any) -> np.ndarray | None:
    """Writes the sheet as a PNG and returns it; None if there are no pictures.

    Prints a line if a picture fails; the run continues.
    """
    try:
        made = sheet(method, sd, data, settings)
    except ValueError as error:
        print(f"preview: no {path.name}: {error}")
        return None
    if made is not None:
        save(path, made)
    return made


def save(path: Path, picture: np.ndarray) -> None:
    """Writes a picture uint8 [H W 3] as a PNG, completely or not at all; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.new_file(path) as temporary:
        files.ask_room(temporary, picture.nbytes)
        Image.fromarray(picture).save(temporary, "PNG")


def lines(folder: Path, step: int, sd: StableDiffusion, settings: Any) -> dict[str, np.ndarray]:
    """Writes a PNG STEP-NN.png for each line of settings.prompts_file and returns {"NN": picture}.

    Prints a line if a picture fails; the run continues.
    """
    made = {}
    for k, line in enumerate(prompt_lines.read(settings.prompts_file, settings.data.word)):
        given = {name: value for name, value in line.items() if name not in ("prompt", "seed")}
        given = {"clip_skip": settings.clip_skip, **given}
        path = folder / f"{step:07d}-{k:02d}.png"
        try:
            picture = generate.text2img(sd, [line["prompt"]], seeds=[line["seed"]], **given)[0]
        except ValueError as error:
            print(f"preview: no {path.name}: {error}")
            continue
        save(path, picture)
        made[f"{k:02d}"] = picture
    return made


def data_sheet(data: Batches) -> np.ndarray:
    """Returns a sheet of up to MOST pictures as the network sees them, from the first batch of each bucket.

    Pictures are cut, scaled and mirrored as in training, and dim outside a mask.  A ControlNet's condition is next to
    each, and its caption below.
    """
    first = {}
    for step in range(LOOKED_AT):
        first.setdefault(data.plan.at(step)[0], step)
    many = max(1, MOST // len(first))
    shown, said = [], []
    for step in sorted(first.values()):
        for row in range(min(many, data.data.batch)):
            item = data.seen(step * data.data.batch + row)
            if "picture" not in item:
                item = {**item["share"].source.view(item["i"], item["size"], item["mirrored"]), **item}
            picture = item["picture"]
            if "mask" in item:
                picture = np.round(picture * (0.25 + 0.75 * item["mask"][..., None])).astype(np.uint8)
            if data.maker is not None:
                hint = item["condition"] if data.maker.endings else data.maker.make(item["picture"])
                picture = np.concatenate([picture, hint], axis=1)
            shown.append(picture)
            said.append(item["caption"] or "(no caption)")
    return grid.captioned(shown, said, COLUMNS)


def _pictures(sd, prompts, seeds, control=(), size=None, unwanted="", **more):
    how = {"control": control, "size": size, "negative_prompt": unwanted, **more}
    return generate.text2img(sd, list(prompts), seeds=seeds, **how)
