"""Makes the pictures of a list, resumably: started again, it makes what is missing.

    python sample/batch.py jobs.jsonl --out pictures
    python sample/batch.py jobs.csv --out pictures --model FOLDER --batch 8 --steps 30
    python sample/batch.py matrix.jsonl --out plots --plot guidance,seed          # a sheet: guidance across, seeds down

A row of the list (JSONL, CSV, parquet) is a picture: prompt, and any of negative, seed (else the row's number), steps,
guidance, sampler, schedule, size, skip, eta, rescale, image, strength, mask, name, resize, grammar, weighting,
noise_source, ensd, guidance_start, guidance_end, threshold, threshold_limit, churn, churn_low, churn_high, churn_noise,
variation_seed, variation, feather, margin, adapters ("<lora:NAME:0.8>", as in prompts).  A seed of -1 is a random one.
A field that is a list is a matrix; flags are for rows that leave a field out, and --set FIELD=VALUE is that for any.
Each picture gets NAME.png with its settings in it, and last NAME.json; rows that cannot be made are in errors.jsonl.
A file of such a name that this program did not write stays, and its row is such a row.

A machine's devices share each batch.  To divide a list over machines, start the same line on each with --distributed,
which joins the launch (SLURM, TPU pod, JAX_COORDINATOR_ADDRESS), or give them --part 0/4, 1/4, ...; the folder is one.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import re
import secrets
import sys
from pathlib import Path

import numpy as np
import options as common
from PIL import ExifTags, Image
from tqdm import tqdm

LONG = 7 * 24 * 3600  # seconds that a process that is done waits for the others
FILES = ("image", "mask")  # fields that name one
# Words of records, for fields that they have no place for.
WORDS = {"image": "Image", "mask": "Mask", "resize": "Resize", "feather": "Feather", "margin": "Margin"}
FLAGS = ("negative", "steps", "guidance", "sampler", "schedule", "size")  # fields with one of their own


def parser():
    """Returns the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("jobs", help="a .jsonl, .csv or .parquet file")
    add("--out", default="outputs/batch", help="folder")
    common.model_options(made)
    add("--adapter", action="append", default=[], metavar="[WORD=]FILE[:STRENGTH]", help="may be given several times")
    add("--adapters", default="adapters", help="folder of those that rows and prompts name, <lora:NAME:0.8>, NAME")
    add("--batch", type=int, default=8, help="pictures made at once")
    add("--part", help="which part of the list, as in 0/4; default: that of this process among JAX's")
    add("--distributed", action="store_true", help="join JAX's other processes first: a part of the list for each")
    add("--format", default="png", choices=("png", "jpg", "webp"), help="of the pictures")
    add("--public", action="store_true", help="leave texts and names of files out of what is written")
    add("--plot", metavar="ACROSS,DOWN", help="two fields: also a sheet of pictures, plot.png")
    for name in FLAGS:
        add(f"--{name}", help="for rows without")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field, for rows without; several times")
    return made


def main(arguments=None):
    """Makes the pictures; returns 0, 1 where rows failed, 2 where nothing could begin."""
    options = parser().parse_args(arguments)
    try:
        made, failed, kept = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return 2
    print(f"{made} pictures made, {kept} were there, {failed} rows failed: {options.out}")
    return int(failed > 0)


def run(options):
    """Makes what is missing and returns how many pictures were made, rows failed, and pictures were there."""
    from sdjax.runtime import compile_cache
    from sdjax.service import lists

    if options.batch < 1:
        raise ValueError(f"--batch={options.batch}: expected at least 1")
    part, parts = _part(options)
    out = Path(options.out)
    pictures, errors = lists.read(options.jobs, _defaults(options), functools.cache(lambda: _word(out)))
    out.mkdir(parents=True, exist_ok=True)
    compile_cache.keep()
    maker = Maker(options, out, pictures)
    mine = pictures[part::parts]
    missing = {picture.name for picture in mine if not maker.done(picture)}
    kept, made = len(mine) - len(missing), 0
    others = [picture for picture in mine if picture.name in missing and maker.in_the_way(picture)]
    errors += [{"row": one.row, "name": one.name, "error": maker.in_the_way(one)} for one in others]
    missing -= {picture.name for picture in others}
    groups = list(lists.grouped(mine, maker.kind))
    most = min(options.batch, max((len(group) for _, group in groups), default=1))  # one shape, no larger than of use
    with tqdm(total=len(missing), desc="pictures", unit="picture", dynamic_ncols=True, smoothing=0.1) as bar:
        for settings, group in groups:
            for first in range(0, len(group), most):  # of all, made or not: the same rows meet at every start
                some = group[first : first + most]
                lacking = [picture for picture in some if picture.name in missing]
                if lacking:
                    found = maker.make(settings, some, lacking, most)
                    errors += found
                    made += len(lacking) - len(found)
                    bar.update(len(lacking))
    _report(out, part, parts, errors)
    if options.plot:
        _plot(maker, pictures, options.plot.split(","))
    return made, len(errors), kept


class Maker:
    """A model, and how one group of pictures is made with it and written."""

    def __init__(self, options, out, pictures):
        import sdjax
        from sdjax import trees
        from sdjax.formats.adapters import attach
        from sdjax.service import provenance

        self.out, self.folder = out, Path(options.jobs).resolve().parent
        self.format, self.public, self.dtype = options.format, options.public, options.dtype
        self.adapters, self.named = options.adapters, ((), None)
        sd = attach.attach_all(common.model(options), options.adapter)
        weights = {part: sd.parts[part] for part in ("unet", "vae", "text_encoder")}
        self.model = {"model": options.model, "adapters": options.adapter, "weights": trees.digest(weights)}
        given = [attach.kind(sd, attach.split(text)[0]) for text in options.adapter]
        hooks = [provenance.adapter_hash(path) for kind, path in given if kind == "hypernet"]
        self.model |= {"hypernets": hooks} if hooks else {}  # which are in no weight
        self.sources = {} if options.public else provenance.of(sd, options.model, options.adapter, vae=options.vae)
        self.sd, texts, self.models = sdjax.spread(sd), {}, {}
        for picture in pictures:
            texts.setdefault(_grammar(picture), []).extend(_texts(picture))
        for grammar, some in texts.items():  # a word of one grammar's prompts is no word of the others'
            known = attach.attach_embeddings(self.sd, some, options.adapters, grammar)
            self.models[grammar] = sdjax.spread(known)

    def path(self, picture):
        """Returns the file of a picture."""
        return self.out / f"{picture.name}.{self.format}"

    def key(self, picture):
        """Returns a hash of everything that a picture's files depend on."""
        names = {"name": picture.name, "row": picture.row, "public": self.public, "dtype": self.dtype}
        given = {name: self._digest(picture.settings[name]) for name in FILES if name in picture.settings}
        about = [names, self.model, picture.settings, self._hashes(picture), *([given] if given else [])]
        made_from = json.dumps(about, sort_keys=True)
        return hashlib.sha256(made_from.encode()).hexdigest()

    def _hashes(self, picture):
        """Returns the hashes of the adapters that a picture's row names, None for one that cannot be read."""
        from sdjax.formats.adapters import attach
        from sdjax.service import lists, provenance

        found = list(provenance.of_adapters(self._embeddings(picture)).values())
        for adapter in lists.prompt(picture.settings)[1]:
            try:
                found.append(provenance.adapter_hash(attach.find(self.adapters, adapter.name)))
            except (ValueError, OSError):
                found.append(None)
        return found

    def _embeddings(self, picture):
        """Returns {"embedding NAME": file} of what a picture's texts name."""
        from sdjax.service import provenance

        return provenance.adapters_named(self.sd, (), _texts(picture), self.adapters, _grammar(picture))

    def kind(self, picture):
        """Returns what pictures of one call have in common beside their settings: sizes of files, else made to fit."""
        own = picture.settings
        sizes = [self._size(own[name]) for name in FILES if name in own and "size" not in own]
        return sizes, self._digest(own["mask"]) if "margin" in own else None  # the margin is around all masks of a call

    def _with(self, wanted, grammar):
        """Returns a grammar's model with the adapters that prompts name; the last one asked for is kept."""
        import sdjax
        from sdjax.formats.adapters import attach

        sd = self.models[grammar]
        if wanted and (wanted, grammar) != self.named[0]:
            self.named = (), None  # its memory goes first
            self.named = (wanted, grammar), sdjax.spread(attach.attach_named(sd, wanted, self.adapters))
        return self.named[1] if wanted else sd

    def done(self, picture):
        """Returns whether a picture is there, made of these settings by this model."""
        found = _about(self.out / f"{picture.name}.json")
        return found is not None and found == self.key(picture) and self.path(picture).is_file()

    def in_the_way(self, picture):
        """Returns the error of a picture in whose place is a file that this program did not write, else None."""
        from sdjax.service import records

        path, beside = self.path(picture), self.out / f"{picture.name}.json"
        ours = records.own(path) if path.exists() else not beside.exists() or _about(beside) is not None
        there = path if path.exists() else beside
        return None if ours else f"name={picture.name!r}: {there} was not written by this program; choose another name"

    def make(self, settings, some, lacking, count):
        """Makes pictures that share settings and writes those that lack; returns {"row", "name", "error"} of failures.

        count: pictures that are made, the last one several times: nothing compiles for what is left over.
        Where one of several cannot be made, all that lack are tried alone, which takes the least memory.
        """
        images, error = _tried(self._images, settings, [*some, *[some[-1]] * (count - len(some))])
        if images is None and count == 1:
            return [{"row": some[0].row, "name": some[0].name, "error": error}]
        if images is None:
            return [found for picture in lacking for found in self.make(settings, [picture], [picture], 1)]
        failed = []
        for (key, image), picture in zip(images, some, strict=False):
            error = _tried(self._write, picture, settings, key, image)[1] if picture in lacking else None
            failed += [{"row": picture.row, "name": picture.name, "error": error}] if error else []
        return failed

    def _images(self, settings, pictures):
        """Returns [(key, pixels)] of pictures that share settings."""
        from sdjax.images import reading
        from sdjax.sampling import generate, inpainting
        from sdjax.service import lists

        keys, rows = [self.key(picture) for picture in pictures], [picture.settings for picture in pictures]
        settings = {name: value for name, value in settings.items() if name != "size" or value is not None}
        settings["seeds"] = [picture.settings.get("seed", picture.row) for picture in pictures]
        settings["negative"] = [row.get("negative", "") for row in rows]
        prompts = [lists.prompt(row)[0] for row in rows]
        sd = self._with(lists.prompt(rows[0])[1], _grammar(pictures[0]))
        images = [reading.picture(self._file(row["image"])) for row in rows if "image" in row]
        masks = [reading.mask(self._file(row["mask"])) for row in rows if "mask" in row]
        if any(row.get("variation") for row in rows):
            settings["noise"] = _noise(sd, rows, settings, images)
        if masks:
            made = inpainting.inpaint(sd, prompts, images, masks, **settings)
        elif images:
            made = generate.img2img(sd, prompts, images, **settings)
        else:
            made = generate.text2img(sd, prompts, **settings)
        return list(zip(keys, made, strict=True))

    def _file(self, name):
        """Returns the path of a file of the list's folder; a list cannot name files elsewhere."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise ValueError(f"{name}: lies outside {self.folder}; expected a file in the list's own folder")
        return path

    def _digest(self, name):
        """Returns a hash of a file of the list's folder, None where it cannot be read."""
        try:
            path = self._file(name)
            state = path.stat()
            return _digest(path, state.st_size, state.st_mtime_ns)
        except (OSError, ValueError):
            return None

    def _size(self, name):
        """Returns (height, width) of a picture of the list's folder, upright; None where it is none."""
        try:
            path = self._file(name)
            state = path.stat()
            return _size(path, state.st_size, state.st_mtime_ns)
        except Exception:  # whatever Pillow raises: the row's own error comes when it is made
            return None

    def _write(self, picture, settings, key, image):
        from sdjax.formats.storage import files
        from sdjax.service import records

        record = self._record(picture, settings, image.shape[:2])
        record = records.public(record) if self.public else record
        records.save(self.path(picture), image, record, beside=False)
        about = {"name": picture.name, "row": picture.row, "made_from": key}
        with files.new_file(self.out / f"{picture.name}.json") as temporary:
            temporary.write_text(json.dumps({**about, "record": json.loads(records.to_json(record))}, indent=1))

    def _record(self, picture, settings, size):
        """Returns the records.Record of a picture."""
        from sdjax.sampling import generate
        from sdjax.service import records

        own, sources = picture.settings, self._sources(picture)
        names = {field.name for field in dataclasses.fields(generate.Job)}
        shared = {name: value for name, value in settings.items() if name in names}
        shared |= {"seeds": [own.get("seed", picture.row)], "negative": own.get("negative", "")}
        shared["variation"] = own.get("variation_seed", 0), own.get("variation", 0.0)
        job = generate.Job([own["prompt"]], **shared)
        task = "inpaint" if "mask" in own else "img2img" if "image" in own else "text2img"
        strength = own.get("strength", {"img2img": 0.75, "inpaint": 1.0}.get(task))
        more = {"Task": task, **sources.get("more", {})}
        more |= {word: str(own[name]) for name, word in WORDS.items() if name in own}
        more |= {} if self.dtype == "float32" else {"Dtype": self.dtype}
        return records.of(job, 0, size, **{**sources, "strength": strength, "more": more})

    def _sources(self, picture):
        """Returns the fields of a record that name model and adapters, those of the row's own field too."""
        from sdjax.service import lists, provenance
        from sdjax.text import grammars

        if self.public:
            return {}
        own = grammars.adapters(picture.settings.get("adapters", ""))[1]
        wanted = lists.prompt(picture.settings)[1]
        named = provenance.adapters_named(self.sd, wanted, _texts(picture), self.adapters, _grammar(picture))
        found = provenance.of_adapters(named)
        if not own:
            return {**self.sources, "hashes": self.sources["hashes"] | found}
        shown = [f"{one.name}:{one.strength:g}" + (f":{one.unet:g}" if one.unet != one.strength else "") for one in own]
        more = self.sources["more"]
        more = {**more, "Adapters": ", ".join([*filter(None, [more.get("Adapters")]), *shown])}
        return {**self.sources, "hashes": self.sources["hashes"] | found, "more": more}


def _about(path):
    """Returns what a picture was made from, by the JSON beside it; None where that is not of this program."""
    try:
        return json.loads(path.read_text())["made_from"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _word(out):
    """Returns a folder's random word, from which seeds of -1 are drawn; it stays, so that all starts draw the same."""
    path = out / "seeds.txt"
    out.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:
            file.write(secrets.token_hex(16))
    except FileExistsError:
        pass
    word = path.read_text()
    if not word:
        raise OSError(f"{path}: is empty; remove it and start again")
    return word


def _grammar(picture):
    return picture.settings.get("grammar", "plain")


def _texts(picture):
    """Returns the texts of a picture in which embeddings may be named."""
    from sdjax.service import lists

    return [lists.prompt(picture.settings)[0], picture.settings.get("negative", "")]


def _defaults(options):
    """Returns the settings of the command line for rows that leave a field out."""
    found = {name: getattr(options, name) for name in FLAGS if getattr(options, name) is not None}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set={text!r}: expected FIELD=VALUE")
        found[name] = value
    return found


def _tried(function, *arguments):
    """Returns (what a function returns, None), or (None, error in one line): nothing that a row does ends the run."""
    try:
        return function(*arguments), None
    except Exception as error:  # of Pillow also SyntaxError, of JAX its own where memory is full
        return None, _line(error)  # the error itself would keep arrays alive


def _line(error):
    """Returns an error in one line, with its kind where it is none of ours."""
    first = next(iter(str(error).splitlines()), "")
    kind = "" if first and isinstance(error, (ValueError, OSError)) else type(error).__name__
    return ": ".join(filter(None, (kind, first)))


@functools.cache
def _digest(path, size, changed):
    """Returns a hash of a file's bytes; kept for as long as its size and time stay."""
    from sdjax.images import reading

    return reading.digest([reading.Item(path)])


@functools.cache
def _size(path, size, changed):
    """Returns (height, width) of a picture, upright, of which only the header is read."""
    from sdjax.images import reading

    with Image.open(path, formats=reading.FORMATS) as image:
        sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size if sideways else image.size[::-1]


def _noise(sd, rows, settings, images):
    """Returns noise [B h w c] to start from, in which each row has its own share of its own variation seed.

    A Job has one variation, whose seeds count on from picture to picture.
    """
    from sdjax.sampling import generate

    size = settings.get("size")
    if images and "margin" not in settings:
        height, width = images[0].shape[:2] if size is None else (size, size) if isinstance(size, int) else size
        shape = (-(-height // sd.factor), -(-width // sd.factor), sd.networks["vae"].config.latent_channels)
    else:
        shape = generate.latent_shape(sd, None if images else size)
    source, drawn = settings.get("noise_source", "jax"), []
    for row, seed in zip(rows, settings["seeds"], strict=True):
        variation = row.get("variation_seed", 0), row.get("variation", 0.0)
        job = generate.Job([""], seeds=[seed], noise_source=source, variation=variation)
        drawn.append(job.start_noise(shape))
    return np.concatenate(drawn)


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
    from sdjax.images import grid
    from sdjax.service import lists

    if len(axes) != 2 or not set(axes) <= set(lists.FIELDS):
        raise ValueError(f"--plot={','.join(axes)!r}: expected two of {', '.join(lists.FIELDS)}")
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
