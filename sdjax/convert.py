"""Converts a model or the result of a run: python -m sdjax.convert SRC DST [--format diffusers|single-file] ...

A model keeps its e4t/ folder.  A model tuned on a picture becomes plain: the offsets are merged into its weights and
the word is a row of its token table.  A single file cannot hold words, so each becomes an embedding beside it.
From a run's folder or checkpoint it writes what the run would have exported then.
A ControlNet becomes a folder for diffusers, or one file for A1111 and ComfyUI.
--adapter sums LoRA and other adapters into the weights.  --merge sums models: A (1 - w) + B w, with --minus
A + (B - C) w.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from sdjax.formats import merging, pipeline
from sdjax.formats.adapters import about, attach, attachable, e4t
from sdjax.formats.models import controlnet
from sdjax.formats.storage import files, headers
from sdjax.methods.e4t import Encoder, plain_model
from sdjax.runtime import compile_cache, signals
from sdjax.training import export
from sdjax.training.run_folder import run_of

OF_RUNS = ("step", "weights", "recipe")
MERGED = 0.5  # weight of the other model
ABOUT = "Converts a model, a ControlNet or the result of a training run."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the conversion, prints its steps or the error in one line, and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return signals.ended(lambda: _converted(options, parser), f"{options.destination} is whole, or as it was")


def _converted(options, parser):
    """Runs the conversion of a parsed command line; returns the exit status."""
    start = time.monotonic()
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    try:
        kind = _run if run_of(options.source) else _control if controlnet.is_control(options.source) else _model
        lines = kind(options, given - {"source", "destination"})
        for line in lines:
            print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"in {time.monotonic() - start:.1f} s")
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="sdjax convert", usage="%(prog)s SRC DST [options]", description=ABOUT)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="pocket, a model folder, a single file, a hub id, a random shape such as random:sd15, or a run's folder",
    )
    parser.add_argument(
        "destination", metavar="DST", help="a folder for diffusers, or FILE.safetensors for A1111 and ComfyUI"
    )
    parser.add_argument("--format", help=f"{' or '.join(pipeline.FORMATS)}; default: by the name of DST")
    parser.add_argument("--dtype", help=f"{', '.join(pipeline.DTYPES)}; default: as stored")
    parser.add_argument(
        "--variant", help="which weight files to read, such as fp16; default: those without a variant, then fp16"
    )
    parser.add_argument("--vision", help="add the image encoder of this folder or hub id")
    parser.add_argument(
        "--no-reference",
        action="store_true",
        help="leave the reference UNet out of e4t/; the encoder then reads the model's UNet",
    )
    parser.add_argument(
        "--shard-size",
        type=float,
        default=files.SHARD_SIZE / 1e9,
        help="largest size of a weight file in GB; default: 10",
    )
    parser.add_argument("--ema", action="store_true", help="use the averaged weights of a single file")
    parser.add_argument(
        "--prediction-type", help="prediction type of a single file: epsilon, v_prediction; default: detected"
    )
    parser.add_argument("--tokenizer", help="folder or hub id with CLIP's vocabulary, for a single file")
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        metavar="FILE[:STRENGTH]",
        help="sum adapters into the weights, and add words: a LoRA, an embedding; a file or hub id",
    )
    parser.add_argument("--merge", metavar="MODEL[:WEIGHT]", help="A (1 - w) + B w with this model as B; default: 0.5")
    parser.add_argument("--minus", metavar="MODEL", help="A + (B - C) w with this model as C")
    parser.add_argument("--step", type=int, help="the run's checkpoint to export; default: the newest")
    parser.add_argument(
        "--weights", choices=export.WEIGHTS, help="the run's averaged or raw weights; default: as in its export"
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="the Python file with the run's method, if that is not sdjax's own"
    )
    return parser


def _run(options, given):
    """Exports a run's checkpoint; yields lines to print."""
    if more := sorted(given - set(OF_RUNS)):
        said = f"of a run accepted are {', '.join(OF_RUNS)}, not {', '.join(more)}; convert what comes out"
        raise ValueError(f"{options.source}: {said}")
    # As in train/run.py, so that a method's computations at the start give the same result.
    told = export.settings_of(options.source, options.recipe)
    compile_cache.keep(steps=told.steps)
    path, step = export.write(options.source, options.destination, options.step, options.weights, told)
    yield f"wrote {path}, step {step} of {options.source}"


def _control(options, given):
    """Converts a ControlNet, to one file if DST ends in .safetensors; yields lines to print."""
    if more := sorted(given - {"dtype", "variant"}):
        raise ValueError(f"{options.source}: of a ControlNet accepted are dtype, variant, not {', '.join(more)}")
    control = controlnet.load_control(options.source, None, variant=options.variant)
    yield f"read {options.source}, a ControlNet"
    told, picture = _described(options.source)
    path = controlnet.save_control(control, options.destination, dtype=options.dtype, about=told)
    yield from _cards(path, told, picture)
    yield f"wrote {path}"


def _model(options, given):
    """Converts a model; yields lines to print."""
    if of_runs := sorted(given & set(OF_RUNS)):
        raise ValueError(f"{options.source}: {', '.join(of_runs)}: for a run's folder; this is none")
    single = {name: getattr(options, name) for name in ("ema", "prediction_type", "tokenizer")}
    form = options.format or ("single-file" if options.destination.endswith(".safetensors") else "diffusers")
    if form == "single-file" and "shard_size" in given:
        raise ValueError(f"--shard-size {options.shard_size:g}: for a folder; {options.destination} is a single file")
    if "no_reference" in given and (form == "single-file" or not _has_e4t(options)):
        raise ValueError(f"--no-reference: for a folder from one with e4t/; {options.source} does not make one")
    changes = bool(options.adapter or options.merge or options.minus)
    dtype = None if changes else options.dtype  # sums are rounded once, when they are written
    sd = pipeline.load(options.source, dtype, variant=options.variant, vision=options.vision, **single)
    yield f"read {options.source}"
    told, picture = _described(options.source)
    if changes:
        sd, told = _summed(options, sd, told)
        yield f"summed {told[about.MERGED]}"
    extras = []
    if any(isinstance(conditioner, Encoder) for conditioner in sd.conditioners):
        sd = plain_model(sd)
    elif form == "single-file" and "image_encoder" in sd.parts:
        yield "left out: the image encoder, which a single file cannot hold"
    elif not os.path.isfile(options.source) and not options.source.startswith(("random:", "new:")):
        place = pipeline.locate(options.source, options.variant)
        extras = e4t.carried(place, options.dtype, not options.no_reference)
    if form == "single-file":
        path, words = pipeline.save_single(sd, options.destination, options.dtype, told)
        for word, place in words.items():
            yield f"wrote {place}: the word {word} as an embedding; in A1111 its word is the file name, {place.stem}"
    else:
        size = int(options.shard_size * 1e9)
        saving = {"dtype": options.dtype, "shard_size": size, "extras": extras, "about": told}
        path = pipeline.save(sd, options.destination, form, **saving)
    yield from _cards(path, told, picture)
    yield f"wrote {path}"


def _summed(options, sd, told):
    """Returns (sd with the other models and the adapters of the command line, its metadata)."""
    names, types = [_called(options.source)], sd.parts
    if options.minus and not options.merge:
        raise ValueError(f"--minus {options.minus}: expected --merge MODEL with it, whose difference is added")
    if options.merge:
        other, weight = _weighed(options.merge)
        more = [pipeline.load(one, None) for one in (other, options.minus) if one]
        sd = merging.merged(sd, more[0], weight, *more[1:])
        names.append(f"{_called(other)}:{weight:g}")
        names += [f"minus {_called(options.minus)}"] if options.minus else []
    given = [(one, *attach.split(one)) for one in options.adapter or ()]
    sd = attach.attach_all(sd, options.adapter or ())
    names += [f"{word or attach.name_of(file)}:{strength:g}" for _, file, strength, word in given]
    # With float32 sums in between, each weight keeps the type of its file.
    parts = {part: jax.tree.map(lambda new, old: new.astype(old.dtype), sd.parts[part], types[part]) for part in types}
    paths = [attachable.given(file) for _, file, _, _ in given]
    words, unwanted = about.triggers(paths)
    return sd.with_parts(**parts), about.merged(told, names, words, unwanted)


def _weighed(text):
    """Returns (model, weight) of "MODEL:0.3"; a built-in model such as random:tiny has a colon too."""
    model, _, weight = text.rpartition(":")
    try:
        return (model, float(weight)) if model and not Path(text).exists() else (text, MERGED)
    except ValueError:
        return text, MERGED


def _called(source):
    """Returns a model's name: a file or folder without its place, or a hub id."""
    path = Path(source)
    return path.stem if path.is_file() else path.resolve().name if path.is_dir() else str(source)


def _described(source):
    """Returns (the metadata of a local source's training, its preview or None)."""
    picture = Path(source) / headers.PREVIEW
    return headers.described(source), picture if picture.is_file() else None


def _cards(path, told, picture):
    """Writes A1111's card beside a single file that describes its training, or a folder's preview; yields lines."""
    if told or picture:
        for one in about.card(path, told, picture):
            yield f"wrote {one}"


def _has_e4t(options):
    """Returns whether the source is a model folder with an e4t/."""
    if os.path.isfile(options.source) or options.source.startswith(("random:", "new:")):
        return False
    return bool(e4t.carried(pipeline.locate(options.source, options.variant)))


if __name__ == "__main__":
    sys.exit(main())
