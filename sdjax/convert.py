"""Converts a model, or what a run learned: python -m sdjax.convert SRC DST [--format diffusers|single-file] ...

A model with an e4t/ keeps it; one that looks at a picture becomes a plain model, with the offsets in its weights and
the word as a row of its token table.  A single file has no place for words: each becomes an embedding beside it.
Of a run's folder, or one of its checkpoints, comes what the run itself would have exported then.
A ControlNet becomes a folder for diffusers, or one file for A1111 and ComfyUI.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from sdjax.formats import pipeline
from sdjax.formats.adapters import e4t, embeddings
from sdjax.formats.adapters.learned_embeds import beside
from sdjax.formats.models import controlnet
from sdjax.formats.storage import files
from sdjax.methods.e4t import Encoder, plain
from sdjax.runtime import compile_cache
from sdjax.training import export
from sdjax.training.run import run_of

OF_RUNS = ("step", "weights", "recipe")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; prints what is done and where the result lies, or the error in one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
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
    parser = argparse.ArgumentParser(prog="python -m sdjax.convert", description="Converts a model from SRC to DST.")
    parser.add_argument(
        "source", metavar="SRC", help="pocket, a model folder, a checkpoint, a hub id, random:sd15, or a run's folder"
    )
    parser.add_argument("destination", metavar="DST", help="the folder to write, or FILE.safetensors")
    parser.add_argument("--format", help=f"{', '.join(pipeline.FORMATS)}; default: what DST looks like")
    parser.add_argument("--dtype", help=f"{', '.join(pipeline.DTYPES)}; default: as stored")
    parser.add_argument("--variant", help="which weights of the source: fp16; default: the plain ones, else fp16")
    parser.add_argument("--vision", help="take the image encoder from this folder or hub id")
    parser.add_argument("--no-reference", action="store_true", help="of an e4t/: the encoder reads the UNet beside it")
    parser.add_argument("--shard-size", type=float, default=files.SHARD_SIZE / 1e9, help="GB per file; default 10")
    parser.add_argument("--ema", action="store_true", help="of a checkpoint: the averaged weights")
    parser.add_argument("--prediction-type", help="of a checkpoint: epsilon, v_prediction; default: found out")
    parser.add_argument("--tokenizer", help="of a checkpoint: a folder or hub id with CLIP's vocabulary")
    parser.add_argument("--step", type=int, help="of a run: which checkpoint; default: the newest")
    parser.add_argument("--weights", choices=export.WEIGHTS, help="of a run; default: those of its own export")
    parser.add_argument("--recipe", metavar="FILE", help="of a run: the Python file with its method, where it is yours")
    return parser


def _run(options, given):
    """Yields what is said while a run's checkpoint is exported."""
    if more := sorted(given - set(OF_RUNS)):
        said = f"of a run accepted are {', '.join(OF_RUNS)}, not {', '.join(more)}; convert what comes out"
        raise ValueError(f"{options.source}: {said}")
    # As train/run.py does: what a method computes at the start must come out as it did.
    told = export.settings_of(options.source, options.recipe)
    compile_cache.keep(steps=told.steps)
    path, step = export.write(options.source, options.destination, options.step, options.weights, told)
    yield f"wrote {path}, step {step} of {options.source}"


def _control(options, given):
    """Yields what is said while a ControlNet is converted: to a folder, or to a file where DST ends in .safetensors."""
    if more := sorted(given - {"dtype", "variant"}):
        raise ValueError(f"{options.source}: of a ControlNet accepted are dtype, variant, not {', '.join(more)}")
    control = controlnet.load_control(options.source, None, variant=options.variant)
    yield f"read {options.source}, a ControlNet"
    yield f"wrote {controlnet.save_control(control, options.destination, dtype=options.dtype)}"


def _model(options, given):
    """Yields what is said while a model is converted."""
    if of_runs := sorted(given & set(OF_RUNS)):
        raise ValueError(f"{options.source}: {', '.join(of_runs)}: for a run's folder; this is none")
    single = {name: getattr(options, name) for name in ("ema", "prediction_type", "tokenizer")}
    form = options.format or ("single-file" if options.destination.endswith(".safetensors") else "diffusers")
    sd = pipeline.load(options.source, options.dtype, variant=options.variant, vision=options.vision, **single)
    yield f"read {options.source}"
    extras, words = [], {}
    if any(isinstance(conditioner, Encoder) for conditioner in sd.conditioners):
        sd = plain(sd)
    elif form == "single-file" and "image_encoder" in sd.parts:
        yield "left out: the image encoder, for which a single file has no place"
    elif not os.path.isfile(options.source) and not options.source.startswith(("random:", "new:")):
        place = pipeline.locate(options.source, options.variant)
        extras = e4t.carried(place, options.dtype, not options.no_reference)
    if form == "single-file" and sd.words:
        sd, words = embeddings.taken(sd)
    size = int(options.shard_size * 1e9)
    path = pipeline.save(sd, options.destination, form, dtype=options.dtype, shard_size=size, extras=extras)
    for word, place in beside(path, words).items():
        written = embeddings.write(place, {word: words[word]}, sd.family)
        yield f"wrote {written}: an embedding, the word {word}; in A1111 the word is the file's name, {place.stem}"
    yield f"wrote {path}"


if __name__ == "__main__":
    sys.exit(main())
