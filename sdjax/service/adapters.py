"""Checks, merges, resizes and extracts adapter files.

    sdjax adapters check cat.safetensors
    sdjax adapters merge cat.safetensors:0.8 ink.safetensors:0.5 --out both.safetensors [--rank 16]
    sdjax adapters merge cat.safetensors --format diffusers --out folder
    sdjax adapters resize cat.safetensors --rank 8 --out small.safetensors
    sdjax adapters extract v1-5.safetensors tuned.safetensors --rank 32 --out cat.safetensors

merge adds effects: exactly, so that ranks add up, or with --rank, --energy or --ratio as the best low-rank
approximation by singular values.  extract approximates the difference of two models.  --energy 0.95 keeps the singular
values with 95 % of the sum of squares, --ratio 20 those of at least 1/20 of the largest.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.formats import pipeline
from sdjax.formats.adapters import about, attach, attachable, kinds, lora_tools
from sdjax.formats.adapters.about import Facts
from sdjax.formats.adapters.low_rank import Cut
from sdjax.formats.storage.hashes import autov3
from sdjax.methods.adapter import Adapter
from sdjax.methods.edits import Factored
from sdjax.runtime import signals
from sdjax.service import checking
from sdjax.service.programs import one_line
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in the first argument; returns the exit status.  `check` returns 1 for a file with faults."""
    options = _parser().parse_args(arguments)
    return signals.ended(lambda: _run(options), "a file that was to be written is whole, or as it was")


def _run(options: argparse.Namespace) -> int:
    """Runs the command of a command line; returns the exit status."""
    begin = time.monotonic()
    try:
        with one_line():
            if options.command == "check":
                return max(_checked(file, options.model) for file in options.files)
            for line in {"merge": _merge, "resize": _resize, "extract": _extract}[options.command](options):
                print(line, flush=True)
    except SystemExit as end:
        return end.code  # pyright: ignore[reportReturnType]  # one_line ends with a number
    print(f"in {time.monotonic() - begin:.1f} s")
    return 0


def _parser():
    made = argparse.ArgumentParser(
        prog="sdjax adapters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model = "the base model; default: SD 1.5, SD 2.1 or pocket, whichever fits"
    check = commands.add_parser("check", help="print what a file is, its base model, and its faults")
    check.add_argument("files", nargs="+", metavar="FILE")
    check.add_argument("--model", help=model)
    merge = commands.add_parser("merge", help="merge adapters into one file, or convert one file")
    merge.add_argument("files", nargs="+", metavar="FILE[:STRENGTH]")
    resize = commands.add_parser("resize", help="change the rank of a LoRA")
    resize.add_argument("files", nargs=1, metavar="FILE")
    extract = commands.add_parser("extract", help="make a LoRA from the difference of two models")
    extract.add_argument("base", metavar="MODEL")
    extract.add_argument("tuned", metavar="TUNED")
    for one in (merge, resize, extract):
        one.add_argument("--rank", type=int, help="keep at most this many singular values")
        one.add_argument("--energy", type=float, help="keep the singular values with this share of the sum of squares")
        one.add_argument("--ratio", type=float, help="keep singular values of at least 1/RATIO of the largest")
        one.add_argument("--out", required=True, help="output file; a folder for formats other than kohya")
        one.add_argument("--format", default="kohya", help="output format: kohya, diffusers, peft ...; default: kohya")
        one.add_argument(
            "--dtype", default="float32", choices=pipeline.DTYPES, help="data type of the file; default: float32"
        )
        if one is not extract:
            one.add_argument("--model", help=model)
    return made


def _cut(options):
    return Cut(options.rank, options.energy, options.ratio)


# ---- the commands ------------------------------------------------------------------------------


def _merge(options) -> Iterator[str]:
    """Merges adapters; yields lines to print."""
    named = [attach.split(text) for text in options.files]
    paths = [attachable.given(file) for file, _, _ in named]
    sd, adapters = _fitting(paths, options.model)
    weighed = [(adapter, strength) for adapter, (_, strength, _) in zip(adapters, named, strict=True)]
    made = lora_tools.merged(weighed, sd, _cut(options))
    if len(paths) == 1:
        made = Adapter(made.edits, made.words, about=adapters[0].about)
    yield from _written(made, sd, options, [file for file, _, _ in named], paths)


def _resize(options) -> Iterator[str]:
    """Changes an adapter's rank; yields lines to print."""
    paths = [attachable.given(options.files[0])]
    sd, (adapter,) = _fitting(paths, options.model)
    yield from _written(lora_tools.resized(adapter, sd, _cut(options)), sd, options, options.files, paths)


def _extract(options) -> Iterator[str]:
    """Extracts a LoRA from two models; yields lines to print."""
    cut = _cut(options)
    base = pipeline.load(options.base)
    yield f"read {options.base}"
    tuned = pipeline.load(options.tuned)
    yield f"read {options.tuned}"
    made, others = lora_tools.extracted(base, tuned, cut)
    if others:
        yield f"left out: {len(others)} norms, biases and embeddings, which a LoRA cannot hold"
    yield from _written(made, base, options, [], [])


def _fitting(paths, model) -> tuple[StableDiffusion, list[Adapter]]:
    """Returns (the model or built-in shape that all adapters fit, the adapters)."""
    trouble = None
    for sd in checking.bases(model):
        try:
            return sd, [attachable.read(path, sd) for path in paths]
        except ValueError as error:
            trouble = trouble or error
    assert trouble is not None
    raise trouble


def _written(
    made: Adapter, sd: StableDiffusion, options: Any, sources: Sequence[str], paths: Sequence[Path]
) -> Iterator[str]:
    """Writes an adapter; yields the line with its path.  sources: what the user named, with their files' `paths`."""
    known = kinds.known()
    if options.format not in known or not known[options.format].holds(made):
        able = ", ".join(name for name, kind in known.items() if kind.holds(made))
        raise SettingError("format", options.format, f"a format for this adapter: {able}")
    out = Path(options.out)
    single = out.suffix == ".safetensors"
    if out.exists():
        raise SettingError("out", options.out, "a new path")
    folder = out.parent if single else out
    folder.mkdir(parents=True, exist_ok=True)
    words, unwanted = about.triggers(paths, made.words)
    facts = Facts(title=out.stem, words=words, unwanted=unwanted)
    told = about.metadata(made, facts, sd)
    if sources:
        told[about.MERGED] = ", ".join(
            f"{attach.name_of(source if attach.is_hub_id(source) else path)} ({autov3(path)})"
            for source, path in zip(sources, paths, strict=True)
        )
    path = known[options.format].write(_cast(made, options.dtype), folder, told)
    about.seal(path)
    about.card(path, told)
    ranks = checking.ranks(made)
    yield f"wrote {path}, {checking.counted(made)}{f', rank {ranks}' if ranks else ''}"


def _cast(adapter, dtype):
    """Returns an adapter with its factors cast to dtype; scales stay float32."""

    def cast(edit):
        kept = {name: x if np.ndim(x) == 0 else np.asarray(x).astype(dtype) for name, x in edit.factors.items()}
        return Factored(kept)

    edits = {part: {name: cast(edit) for name, edit in some.items()} for part, some in adapter.edits.items()}
    return Adapter(edits, adapter.words, about=adapter.about)


def _checked(file, model) -> int:
    """Prints the report on a file; returns 1 if it has faults."""
    lines, wrong = checking.report(file, model)
    print("\n".join([*lines, *(f"wrong: {line}" for line in wrong)]))
    return int(bool(wrong))
