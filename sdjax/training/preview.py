"""Pictures during training with fixed seeds, which show the progress of the run."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sdjax.data.batches import Batches
from sdjax.formats.storage import files
from sdjax.images import grid
from sdjax.methods.method import Method
from sdjax.runtime import room
from sdjax.sampling import generate
from sdjax.stable_diffusion import StableDiffusion
from sdjax.training import previewed, prompt_lines

SEEDS, UNASKED, STEPS = 4, 2, 20  # pictures of each prompt; of all prompts together that nobody asked for
MOST, COLUMNS, LOOKED_AT = 16, 4, 64  # pictures on the data sheet, pictures per row, steps searched for buckets
NO_CAPTION = "(no caption)"
FULL = "out of memory; preview=0 draws none"


class Preview(NamedTuple):
    """A sheet uint8 [height width 3]; its pictures uint8 [H W 3] and their prompts, where prompts alone make them."""

    sheet: np.ndarray
    pictures: Sequence[np.ndarray] = ()
    prompts: Sequence[str] = ()


def sheet(method: Method, sd: StableDiffusion, data: Any, settings: Any, steps: int = STEPS) -> Preview | None:
    """Returns the Preview of a run, prompts by seeds; None if there are no pictures.

    steps: of the sampler.
    A method with its own previews shows these, one row each.  Previews that start from pictures of the data
    (previewed.starts) have a row for each: what is given, then a picture per prompt, or one of its own caption.
    """
    if method.preview is not None:
        rows = method.preview(sd, data[0])
        return Preview(grid.sheet(list(rows.values()), list(rows))) if rows else None
    texts, own = previewed.prompts(settings, data), not previewed.asked(settings)
    how = {"steps": steps, "clip_skip": settings.clip_skip, "grammar": _grammar(settings)}
    how["negative_prompt"] = ", ".join(method.unwanted)
    starts = previewed.starts(sd, data, settings)
    if starts:
        rows = []
        for one in starts:
            wanted = [one.caption] if own else list(texts)
            rows.append([*one.shown.values(), *one.draw(wanted, seeds=[0] * len(wanted), **how)])
        columns = (*starts[0].shown, *(("its caption",) if own else texts))
        return Preview(grid.sheet(rows, [one.caption for one in starts] if own else (), columns))
    seeds = range(SEEDS if settings.prompts else max(1, UNASKED // len(texts)))
    rows = [list(generate.text2img(sd, [text] * len(seeds), seeds=seeds, **how)) for text in texts]
    shown = grid.sheet(rows, [text or NO_CAPTION for text in texts], [f"seed {seed}" for seed in seeds])
    return Preview(shown, [one for row in rows for one in row], [text for text in texts for _ in seeds])


def _grammar(settings):
    """Returns the grammar of the previews' prompts: A1111's, as kohya reads them; captions are read as in training."""
    return "a1111" if settings.prompts else "plain"


def write(path: Path, method: Method, sd: StableDiffusion, data: Any, settings: Any) -> Preview | None:
    """Writes the sheet as a PNG and returns the Preview; None if there are no pictures.

    Prints a line if a picture fails; the run continues.
    """
    try:
        with room.memory(FULL):
            made = sheet(method, sd, data, settings)
    except ValueError as error:
        print(f"preview: no {path.name}: {error}")
        return None
    if made is not None:
        save(path, made.sheet)
    return made


def save(path: Path, picture: np.ndarray) -> None:
    """Writes a picture uint8 [H W 3] as a PNG, completely or not at all; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.new_file(path) as temporary:
        files.ask_room(temporary, picture.nbytes)
        Image.fromarray(picture).save(temporary, "PNG")


def lines(folder: Path, step: int, sd: StableDiffusion, data: Any, settings: Any) -> dict[str, tuple[np.ndarray, str]]:
    """Writes a PNG STEP-NN.png for each line of settings.prompts_file and returns {"NN": (picture, prompt)}.

    Previews that start from pictures of the data take one after the other.  Prints a line if a picture fails; the run
    continues.
    """
    made, starts = {}, previewed.starts(sd, data, settings)
    draws = [one.draw for one in starts] or [functools.partial(generate.text2img, sd)]
    for k, line in enumerate(prompt_lines.read(settings.prompts_file, settings.data.word)):
        given = {name: value for name, value in line.items() if name not in ("prompt", "seed")}
        given = {"clip_skip": settings.clip_skip, **given}
        path = folder / f"{step:07d}-{k:02d}.png"
        try:
            with room.memory(FULL):
                picture = draws[k % len(draws)]([line["prompt"]], seeds=[line["seed"]], **given)[0]
        except ValueError as error:
            print(f"preview: no {path.name}: {error}")
            continue
        save(path, picture)
        made[f"{k:02d}"] = picture, line["prompt"]
    return made


def first_steps(data: Batches) -> list[int]:
    """Returns the first step of each size of pictures, of the run's first LOOKED_AT steps."""
    found: dict[Any, int] = {}
    for step in range(LOOKED_AT):
        found.setdefault(data.plan.at(step)[0], step)
    return sorted(found.values())


def data_sheet(data: Batches) -> np.ndarray:
    """Returns a sheet of up to MOST pictures as the network sees them, from the first batch of each bucket.

    Pictures are cut, scaled and mirrored as in training, and dim outside a mask.  A ControlNet's condition is next to
    each, and its caption below.
    """
    first = first_steps(data)
    many = max(1, MOST // len(first))
    shown, said = [], []
    for step in first:
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
            said.append(item["caption"] or NO_CAPTION)
    return grid.captioned(shown, said, COLUMNS)
