"""Makes the pictures of a list, resumably: started again, it makes what is missing.

    python sample/batch.py jobs.jsonl --out pictures
    python sample/batch.py jobs.csv --out pictures --model FOLDER --batch 8 --steps 30
    python sample/batch.py matrix.jsonl --out plots --plot guidance,seed          # a sheet: guidance across, seeds down

A row of the list (JSONL, CSV, parquet) is a picture: prompt, and any of negative, seed (else the row's number), steps,
guidance, sampler, schedule, size, skip, eta, rescale, image, strength, mask, name, resize, grammar, weighting,
noise_source, ensd, guidance_start, guidance_end, threshold, threshold_limit, churn, churn_low, churn_high, churn_noise.
A field that is a list is a matrix; flags are for rows that leave a field out.  Each picture gets
NAME.png with its settings in it, and last NAME.json; rows that cannot be made are in errors.jsonl.

A machine's devices share each batch.  To divide a list over machines, start the same line on each with --distributed,
which joins the launch (SLURM, TPU pod, JAX_COORDINATOR_ADDRESS), or give them --part 0/4, 1/4, ...; the folder is one.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

LONG = 7 * 24 * 3600  # seconds that a process that is done waits for the others
WORDS = {"image": "Image", "mask": "Mask", "resize": "Resize"}  # of records, for fields that they have no place for


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
    add(
        "--adapters", default="adapters", help="folder of those that prompts of the grammar a1111 name, <lora:NAME:0.8>"
    )
    add("--dtype", default="float32", help="float32, bfloat16, float16")
    add("--batch", type=int, default=8, help="pictures made at once")
    add("--part", help="which part of the list, as in 0/4; default: that of this process among JAX's")
    add("--distributed", action="store_true", help="join JAX's other processes first: a part of the list for each")
    add("--format", default="png", choices=("png", "jpg", "webp"), help="of the pictures")
    add("--public", action="store_true", help="leave texts and names of files out of what is written")
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
    part, parts = _part(options)
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
        _plot(maker, pictures, options.plot.split(","))
    return made, len(errors), len(mine) - len(missing)


class Maker:
    """A model, and how one group of pictures is made with it and written."""

    def __init__(self, options, out):
        import sdjax
        from sdjax import sources, trees
        from sdjax.convert import adapters

        self.out, self.batch, self.folder = out, options.batch, Path(options.jobs).resolve().parent
        self.format, self.public, self.dtype = options.format, options.public, options.dtype
        self.adapters, self.named = options.adapters, ((), None)
        sd = adapters.attach_all(sdjax.load(options.model, options.dtype), options.adapter)
        weights = {part: getattr(sd, part) for part in ("unet", "vae", "text_encoder")}
        self.model = {"model": options.model, "adapters": options.adapter, "weights": trees.digest(weights)}
        self.sources = {} if options.public else sources.of(sd, options.model, options.adapter)
        self.sd = sdjax.spread(sd)

    def path(self, picture):
        """Returns the file of a picture."""
        return self.out / f"{picture.name}.{self.format}"

    def key(self, picture):
        """Returns a hash of everything that a picture's files depend on."""
        names = {"name": picture.name, "row": picture.row, "public": self.public, "dtype": self.dtype}
        made_from = json.dumps([names, self.model, picture.settings, self._hashes(picture)], sort_keys=True)
        return hashlib.sha256(made_from.encode()).hexdigest()

    def _hashes(self, picture):
        """Returns the hashes of the adapters that a picture's prompt names, None for one that is not there."""
        from sdjax import jobs, sources
        from sdjax.convert import adapters

        found = []
        for adapter in jobs.prompt(picture.settings)[1]:
            try:
                found.append(sources.adapter_hash(adapters.find(self.adapters, adapter.name)))
            except ValueError:
                found.append(None)
        return found

    def _with(self, wanted):
        """Returns the model with the adapters that prompts name; the last one asked for is kept."""
        import sdjax
        from sdjax.convert import adapters

        if wanted and wanted != self.named[0]:
            self.named = (), None  # its memory goes first
            self.named = wanted, sdjax.spread(adapters.attach_named(self.sd, wanted, self.adapters))
        return self.named[1] if wanted else self.sd

    def done(self, picture):
        """Returns whether a picture is there, made of these settings by this model."""
        try:
            found = json.loads((self.out / f"{picture.name}.json").read_text())["made_from"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return found == self.key(picture) and self.path(picture).is_file()

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
                self._write(picture, settings, image)
        return []

    def _images(self, settings, rows, numbers):
        from sdjax import generate, inpainting, jobs

        settings = {name: value for name, value in settings.items() if name != "size" or value is not None}
        settings["seeds"] = [row.get("seed", number) for row, number in zip(rows, numbers, strict=True)]
        settings["negative"] = [row.get("negative", "") for row in rows]
        prompts = [jobs.prompt(row)[0] for row in rows]
        sd = self._with(jobs.prompt(rows[0])[1])
        if "image" not in rows[0]:
            return generate.text2img(sd, prompts, **settings)
        images = [self._picture(row["image"], "RGB") for row in rows]
        if "mask" not in rows[0]:
            return generate.img2img(sd, prompts, images, **settings)
        masks = [self._picture(row["mask"], "L") for row in rows]
        return inpainting.inpaint(sd, prompts, images, masks, **settings)

    def _picture(self, name, mode):
        """Returns a picture of the list's folder; a list cannot name files elsewhere."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise ValueError(f"{name}: lies outside {self.folder}; expected a file in the list's own folder")
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))

    def _write(self, picture, settings, image):
        from sdjax import records
        from sdjax.convert import files

        record = self._record(picture, settings, image.shape[:2])
        record = records.public(record) if self.public else record
        records.save(self.path(picture), image, record, beside=False)
        about = {"name": picture.name, "row": picture.row, "made_from": self.key(picture)}
        with files.new_file(self.out / f"{picture.name}.json") as temporary:
            temporary.write_text(json.dumps({**about, "record": json.loads(records.to_json(record))}, indent=1))

    def _record(self, picture, settings, size):
        """Returns the records.Record of a picture."""
        from sdjax import generate, records

        own = picture.settings
        names = {field.name for field in dataclasses.fields(generate.Job)}
        shared = {name: value for name, value in settings.items() if name in names}
        seeds, negative = [own.get("seed", picture.row)], own.get("negative", "")
        job = generate.Job([own["prompt"]], seeds=seeds, negative=negative, **shared)
        task = "inpaint" if "mask" in own else "img2img" if "image" in own else "text2img"
        strength = own.get("strength", {"img2img": 0.75, "inpaint": 1.0}.get(task))
        more = {"Task": task, **self.sources.get("more", {})}
        more |= {word: own[name] for name, word in WORDS.items() if name in own}
        more |= {} if self.dtype == "float32" else {"Dtype": self.dtype}
        return records.of(job, 0, size, **{**self.sources, "strength": strength, "more": more})


def _part(options):
    """Returns (0, 4) of --part 0/4; without it this process and the number of all that JAX knows."""
    import jax

    if options.distributed:
        jax.distributed.initialize(shutdown_timeout_seconds=LONG)
    if options.part is None:
        return jax.process_index(), jax.process_count()
    found = re.fullmatch(r"(\d+)/(\d+)", options.part)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"--part={options.part!r}: expected a part and their number, 0/4 to 3/4")
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


def _plot(maker, pictures, axes):
    """Writes plot.png, a sheet of the pictures whose columns and rows are the values of two fields."""
    from sdjax import grid, jobs

    if len(axes) != 2 or not set(axes) <= set(jobs.FIELDS):
        raise ValueError(f"--plot={','.join(axes)!r}: expected two of {', '.join(jobs.FIELDS)}")
    across, down = axes
    found = {}
    for picture in pictures:
        path = maker.path(picture)
        place = tuple(str(picture.settings.get(axis, "")) for axis in (down, across))
        if path.is_file() and place not in found:
            found[place] = np.asarray(Image.open(path))
    rows, columns = (list(dict.fromkeys(place[i] for place in found)) for i in (0, 1))
    sheet = [[found.get((row, column)) for column in columns] for row in rows]
    names = [[f"{axis} {value}" for value in values] for axis, values in ((down, rows), (across, columns))]
    Image.fromarray(grid.sheet(sheet, *names)).save(maker.out / "plot.png")


if __name__ == "__main__":
    sys.exit(main())
