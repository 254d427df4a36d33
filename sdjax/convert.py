"""Converts a model: python -m sdjax.convert SRC DST [--format diffusers|single-file] [--dtype float16] ...

A model with an e4t/ keeps it; one that looks at a picture becomes a plain model, with the offsets in its weights and
the word as a row of its token table.  A single file has no place for words beside CLIP's vocabulary: each becomes an
embedding beside it.  A run's folder, or one of its checkpoints, is handed to sdjax.training.export, a program of its
own: training lies above this package, which cannot import it.
"""

import argparse
import os
import subprocess
import sys
import time

from sdjax.formats import pipeline
from sdjax.formats.adapters import e4t, embeddings
from sdjax.formats.models import lpips, single_file
from sdjax.formats.storage import files
from sdjax.methods.e4t import Encoder, plain
from sdjax.training import results


def main(arguments=None):
    """Returns the exit status; prints what is done and where the result lies, or the error in one line."""
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
    parser.add_argument("--step", help="of a run: which checkpoint; default: the newest")
    parser.add_argument("--weights", choices=("ema", "raw"), help="of a run; default: those of its own export")
    options = parser.parse_args(arguments)
    if results.run_of(options.source):
        return _hand_over(parser, options)
    single = {name: getattr(options, name) for name in ("ema", "prediction_type", "tokenizer")}
    form = options.format or ("single-file" if options.destination.endswith(".safetensors") else "diffusers")
    start = time.monotonic()
    try:
        if options.step or options.weights:
            raise ValueError(f"{options.source}: step and weights are for a run's folder; this is none")
        if options.vision and lpips.is_file(options.vision):
            raise ValueError(f"vision={options.vision}: a file; a folder or hub id with an image encoder is expected")
        sd = pipeline.load(options.source, options.dtype, variant=options.variant, vision=options.vision, **single)
        extras = []
        if any(isinstance(conditioner, Encoder) for conditioner in sd.conditioners):
            sd = plain(sd)
        elif form == "single-file" and sd.image_encoder is not None:
            print("left out: the image encoder, for which a single file has no place")
        elif not os.path.isfile(options.source) and not options.source.startswith(("random:", "new:")):
            extras = e4t.carried(
                pipeline.locate(options.source, options.variant), options.dtype, not options.no_reference
            )
        print(f"read {options.source} in {time.monotonic() - start:.1f} s", flush=True)
        words = {}
        if form == "single-file" and sd.words and single_file.has_usual_words(sd):
            sd, words = embeddings.taken(sd)
        size = int(options.shard_size * 1e9)
        folder = pipeline.save(sd, options.destination, form, dtype=options.dtype, shard_size=size, extras=extras)
        for word, path in _beside(folder, words).items():
            print(f"wrote {embeddings.write(path, {word: words[word]})}: an embedding, the word {word}")
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"wrote {folder} in {time.monotonic() - start:.1f} s")
    return 0


def _beside(path, words):
    """Returns {word: its file beside a checkpoint}; A1111 takes a file's name for the word: cat.safetensors, cat-s."""
    found = {}
    for i, word in enumerate(words):
        letters = "".join(letter for letter in word if letter.isalnum() or letter in "-_")
        place = path.with_name(f"{path.stem}-{letters or i}.safetensors")
        found[word] = place.with_stem(f"{place.stem}-{i}") if place in found.values() else place
    return found


def _hand_over(parser, options):
    """Returns the exit status of the program that exports a run."""
    given = {name: value for name, value in vars(options).items() if value != parser.get_default(name)}
    more = given.keys() - {"source", "destination", "step", "weights"}
    if more:
        said = f"of a run accepted are step and weights, not {', '.join(sorted(more))}; convert what comes out"
        print(f"error: {options.source}: {said}", file=sys.stderr)
        return 1
    flags = [f"--{name}={given[name]}" for name in ("step", "weights") if name in given]
    program = [sys.executable, "-m", "sdjax.training.export", *flags, "--", options.source, options.destination]
    return subprocess.run(program).returncode


if __name__ == "__main__":
    sys.exit(main())
