"""Makes the pictures of a list, resumably: started again, it makes what is missing.

    python sample/batch.py jobs.jsonl --out pictures
    python sample/batch.py jobs.csv --out pictures --model FOLDER --batch 8 --steps 30
    python sample/batch.py matrix.jsonl --out plots --plot guidance,seed          # a sheet: guidance across, seeds down

A row of the list (JSONL, CSV, parquet) is a picture: prompt, and any of negative, seed (else the row's number), steps,
guidance, sampler, schedule, size, skip, eta, rescale, image, strength, mask, name.  A field that is a list is a matrix;
flags are for rows that leave a field out.  Each picture gets NAME.png and, last, NAME.json; rows that cannot be made
are in errors.jsonl.

To divide a list over machines, give each one --part 0/4, 1/4, ... and the same folder.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm


def parser():
    """Returns the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("jobs", help="a .jsonl, .csv or .parquet file")
    add("--out", default="outputs/batch", help="folder")
    add(
        "--model",
        default="pocket",
        help="pocket, a diffusers folder, a single file, a hub id, random:sd15 and the like",
    )
    add("--adapter", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be given several times")
    add("--dtype", default="float32", help="float32, bfloat16, float16")
    add("--batch", type=int, default=8, help="pictures made at once")
    add("--part", default="0/1", help="which part of the list, as in 0/4")
    add("--plot", metavar="ACROSS,DOWN", help="two fields: also a sheet of pictures, plot.png")
    add("--negative", help="for rows without")
    add("--steps", type=int, help="for rows without")
    add("--guidance", type=float, help="for rows without")
    add("--sampler", help="for rows without")
    add("--schedule", help="for rows without")
    add("--size", help="for rows without")
    return made


def main(arguments=None):
    """Makes the pictures; returns 0, 1 where rows failed, 2 where nothing could begin."""
    options = parser().parse_args(arguments)
    try:
        made, failed, kept = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{made} pictures made, {kept} were there, {failed} rows failed: {options.out}")
    return int(failed > 0)


def run(options):
    """Makes what is missing and returns how many pictures were made, rows failed, and pictures were there."""
    from sdjax import compiled, jobs

    if options.batch < 1:
        raise ValueError(f"--batch={options.batch}: expected at least 1")
    part, parts = _part(options.part)
    flags = ("negative", "steps", "guidance", "sampler", "schedule", "size")
    defaults = {name: getattr(options, name) for name in flags}
    pictures, errors = jobs.read(options.jobs, {name: value for name, value in defaults.items() if value is not None})
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    compiled.keep()
    maker = Maker(options, out)
    mine = pictures[part::parts]
    missing = {picture.name for picture in mine if not maker.done(picture)}
    made = 0
    with tqdm(total=len(missing), desc="pictures", unit="picture", dynamic_ncols=True, smoothing=0.1) as bar:
        for settings, group in jobs.grouped(mine):
            for first in range(0, len(group), options.batch):  # of all, made or not: the same rows meet at every start
                some = group[first : first + options.batch]
                lacking = [picture for picture in some if picture.name in missing]
                if lacking:
                    found = maker.make(settings, some, lacking)
                    errors += found
                    made += len(lacking) - len(found)
                    bar.update(len(lacking))
    _report(out, part, parts, errors)
    if options.plot:
        _plot(out, pictures, options.plot.split(","))
    return made, len(errors), len(mine) - len(missing)


class Maker:
    """A model, and how one group of pictures is made with it and written."""

    def __init__(self, options, out):
        import sdjax
        from sdjax import trees
        from sdjax.convert import adapters

        self.out, self.batch, self.folder = out, options.batch, Path(options.jobs).resolve().parent
        self.sd = adapters.attach_all(sdjax.load(options.model, options.dtype), options.adapter)
        weights = {part: getattr(self.sd, part) for part in ("unet", "vae", "text_encoder")}
        self.model = {"model": options.model, "adapters": options.adapter, "weights": trees.digest(weights)}

    def record(self, picture):
        """Returns what NAME.json says of a picture: everything that it depends on."""
        return {"name": picture.name, "row": picture.row, **self.model, "settings": picture.settings}

    def done(self, picture):
        """Returns whether a picture is there, made of these settings by this model."""
        try:
            found = json.loads((self.out / f"{picture.name}.json").read_text())
        except (OSError, ValueError):
            return False
        wanted = json.loads(json.dumps(self.record(picture)))
        return found == wanted and (self.out / f"{picture.name}.png").is_file()

    def make(self, settings, some, lacking):
        """Makes pictures that share settings and writes those that lack; returns {"row", "name", "error"} of failures.

        Where one of several cannot be made, all that lack are tried alone.
        """
        full = [*some, *[some[-1]] * (self.batch - len(some))]  # one shape: nothing compiles for what is left over
        try:
            images = self._images(settings, [picture.settings for picture in full], [picture.row for picture in full])
        except (ValueError, OSError) as error:
            if len(some) == 1:
                return [{"row": some[0].row, "name": some[0].name, "error": str(error).splitlines()[0]}]
            return [found for picture in lacking for found in self.make(settings, [picture], [picture])]
        for picture, image in zip(some, images, strict=False):
            if picture in lacking:
                self._write(picture, image)
        return []

    def _images(self, settings, rows, numbers):
        from sdjax import generate, inpainting

        settings = {name: value for name, value in settings.items() if name != "size" or value is not None}
        settings["seeds"] = [row.get("seed", number) for row, number in zip(rows, numbers, strict=True)]
        settings["negative"] = [row.get("negative", "") for row in rows]
        prompts = [row["prompt"] for row in rows]
        if "image" not in rows[0]:
            return generate.text2img(self.sd, prompts, **settings)
        images = [self._picture(row["image"], "RGB") for row in rows]
        if "mask" not in rows[0]:
            return generate.img2img(self.sd, prompts, images, **settings)
        masks = [self._picture(row["mask"], "L") for row in rows]
        return inpainting.inpaint(self.sd, prompts, images, masks, **settings)

    def _picture(self, name, mode):
        """Returns a picture of the list's folder; a list cannot name files elsewhere."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise ValueError(f"{name}: lies outside {self.folder}; expected a file in the list's own folder")
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))

    def _write(self, picture, image):
        from sdjax.convert import files

        with files.new_file(self.out / f"{picture.name}.png") as temporary:
            Image.fromarray(image).save(temporary, "PNG")
        with files.new_file(self.out / f"{picture.name}.json") as temporary:
            temporary.write_text(json.dumps(self.record(picture), indent=1))


def _part(text):
    """Returns (0, 4) of "0/4"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"--part={text!r}: expected a part and their number, 0/4 to 3/4")
    return int(found[1]), int(found[2])


def _report(out, part, parts, errors):
    """Writes the failed rows, one JSON object a line; no file where there are none."""
    path = out / ("errors.jsonl" if parts == 1 else f"errors-{part}-{parts}.jsonl")
    for error in errors:
        print(f"row {error['row']}: {error['error']}", file=sys.stderr)
    if errors:
        path.write_text("".join(json.dumps(error) + "\n" for error in errors))
    else:
        path.unlink(missing_ok=True)


def _plot(out, pictures, axes):
    """Writes plot.png, a sheet of the pictures whose columns and rows are the values of two fields."""
    from sdjax import grid, jobs

    if len(axes) != 2 or not set(axes) <= set(jobs.FIELDS):
        raise ValueError(f"--plot={','.join(axes)!r}: expected two of {', '.join(jobs.FIELDS)}")
    across, down = axes
    found = {}
    for picture in pictures:
        path = out / f"{picture.name}.png"
        place = tuple(str(picture.settings.get(axis, "")) for axis in (down, across))
        if path.is_file() and place not in found:
            found[place] = np.asarray(Image.open(path))
    rows, columns = (list(dict.fromkeys(place[i] for place in found)) for i in (0, 1))
    sheet = [[found.get((row, column)) for column in columns] for row in rows]
    names = [[f"{axis} {value}" for value in values] for axis, values in ((down, rows), (across, columns))]
    Image.fromarray(grid.sheet(sheet, *names)).save(out / "plot.png")


if __name__ == "__main__":
    sys.exit(main())
