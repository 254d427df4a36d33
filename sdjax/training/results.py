"""What a run leaves for others, and what a run can start from: one function each way, for every method.

write(method, frozen, trained, "outputs/cat/export")    # a diffusers folder, or one adapter file
trained, frozen = start(method, trained, frozen, "learned_embeds.safetensors")
"""

import dataclasses
import json
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sdjax.formats import pipeline
from sdjax.formats.adapters import attach, e4t, embeddings
from sdjax.methods.chain import Chain, named_part
from sdjax.methods.e4t import E4T
from sdjax.methods.textual_inversion import TextualInversion


def write(method, frozen, trained, destination):
    """Writes what a method learned and returns the path: an embedding file, a folder with e4t/, or a plain folder."""
    destination = Path(destination)
    if isinstance(method, TextualInversion):
        return _write_rows(method, trained, destination)
    for part, tree in _parts(method, trained):
        if isinstance(part, E4T):
            return _write_e4t(part, method, frozen, trained, tree, destination)
    return pipeline.save(method.join(frozen, trained), destination)


def advice(frozen, result):
    """Returns how programs without E4T's encoder get its subject, where `write` wrote one that sees a picture."""
    if "concept" not in (frozen.reference or {}):
        return ""
    return (
        f"; for PyTorch and other programs without its encoder: python -m sdjax.convert {shlex.quote(str(result))} DST"
    )


def start(method, trained, frozen, source):
    """Returns (trained, frozen) with the trained weights that a file or folder holds in place of fresh ones.

    Raises ValueError when no part of the method can start from a file, or what it holds does not fit.
    """
    if isinstance(method, Chain):
        able = [str(i) for i, part in enumerate(method.parts) if isinstance(part, TextualInversion | E4T)]
        if not able:
            raise ValueError(f"init={source!r}: no part of this Chain starts from a file")
        for i in able:
            with named_part(i):
                tree, frozen = start(method.parts[int(i)], trained[i], frozen, source)
            trained = {**trained, i: tree}
        return trained, frozen
    if isinstance(method, E4T):
        return e4t.start(method, trained, frozen, pipeline.locate(source))
    if isinstance(method, TextualInversion):
        return _read_rows(trained, frozen, source), frozen
    raise ValueError(f"init={source!r}: {type(method).__name__} starts from its model; give model={source!r} instead")


def run_of(source):
    """Returns (folder of the run, step or None) of a run's folder or RUN/checkpoints/STEP; None for anything else."""
    folder, step = Path(source).absolute(), None
    if folder.name.isdecimal() and folder.parent.name == "checkpoints" and folder.is_dir():
        folder, step = folder.parents[1], int(folder.name)
    run = (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
    return (folder, step) if run else None


def _parts(method, trained):
    if isinstance(method, Chain):
        return [(part, trained[str(i)]) for i, part in enumerate(method.parts)]
    return [(method, trained)]


def _write_e4t(part, method, frozen, trained, tree, destination):
    """Writes a model whose e4t/ holds `part`'s tree; the other parts of a Chain go into the weights beside it."""
    plain = frozen
    for i, other in reversed(list(enumerate(method.parts)) if isinstance(method, Chain) else []):
        plain = plain if other is part else other.join(plain, trained[str(i)])
    return pipeline.save(
        plain, destination, extras=[lambda sd, folder: e4t.write(part, tree, frozen, plain, folder / "e4t")]
    )


def _write_rows(method, trained, destination):
    """Writes {word: rows [vectors C]}, the layout of diffusers' learned_embeds.safetensors, and who learned them."""
    destination.mkdir(parents=True, exist_ok=True)
    path = destination / "learned_embeds.safetensors"
    about = {"method": type(method).__name__, "settings": json.dumps(dataclasses.asdict(method))}
    return embeddings.write(path, {method.word: np.asarray(trained["rows"], np.float32)}, about)


def _read_rows(trained, frozen, source):
    try:
        found = attach.words(source, frozen.networks)
    except ValueError as error:
        raise ValueError(f"init={source!r}: {error}") from None
    if len(found) != 1:
        raise ValueError(f"init={source!r}: holds {len(found)} words; expected an embedding of one")
    (rows,) = found.values()
    if rows.shape != trained["rows"].shape:
        raise ValueError(f"init={source!r}: rows {rows.shape} where this method has {trained['rows'].shape}")
    return {"rows": jnp.asarray(rows)}
