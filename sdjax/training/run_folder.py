"""A run's folder: its settings and origin, checked on resuming, and its export.

config.json holds the run's settings.  origin.json holds the digest of its start (`begin` in begin.py) and, for a run on
one picture, the fingerprint of the picture.

export(method, frozen, trained, "outputs/cat/export")     # a diffusers folder or a file of the method's format
trained, frozen = start(method, trained, frozen, opened)  # from such a file
"""

import contextlib
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.data import sources
from sdjax.data.sources.source import Examples
from sdjax.formats import pipeline
from sdjax.formats.adapters import about, kinds
from sdjax.formats.adapters.about import Facts
from sdjax.formats.adapters.format import Format
from sdjax.formats.models.folder import INDEX
from sdjax.formats.storage import files
from sdjax.methods.adapter import Adapter
from sdjax.methods.chain import Chain
from sdjax.methods.method import Method
from sdjax.runtime import locks
from sdjax.settings import CLASS, SettingError, prefixed, to_json
from sdjax.stable_diffusion import StableDiffusion
from sdjax.training.settings import FORMS

RUN = "Train"  # the class in a run's config.json
PROGRAMS = {  # program for the models of a pipeline; text2img for others
    "StableDiffusionInpaintPipeline": "inpaint --image FILE --mask FILE",
    "StableDiffusionUpscalePipeline": "upscale --image FILE",
    "LDMSuperResolutionPipeline": "upscale --image FILE",
}
FOLDER, SINGLE, _ = FORMS  # of a whole model or a ControlNet
PICTURE = "{picture}"  # in `out`: replaced by the name of the run's picture


def place(settings: Any, default: str | Path) -> Path:
    """Returns a run's folder: settings.out, or `default` if that is "".

    "outputs/tune/{picture}" is a folder per picture, named after its file: NAME, or NAME-2, NAME-3 ... if NAME belongs
    to another picture or model.  The same picture gets its own folder again, so its run resumes.
    """
    out = settings.out or str(default)
    if PICTURE not in out:
        return Path(out)
    name, number = Path(settings.data.path).stem or "run", 1
    pictures = mark(sources.open(settings.data)) if settings.data.path else None
    while True:
        folder = Path(out.replace(PICTURE, name if number == 1 else f"{name}-{number}"))
        if not (folder / "config.json").is_file() or _is_of(folder, settings, pictures):
            return folder
        number += 1


def mark(examples: Examples) -> list | None:
    """Returns the fingerprint of a run's only picture; None for several pictures, which take too long to read."""
    return examples.fingerprint() if len(examples) == 1 else None


def _is_of(folder, settings, pictures):
    """Returns whether a folder's run has these settings' model, method and pictures."""
    there, wanted, origin = _settings(folder), to_json(settings), folder / "origin.json"
    kept = files.read_json(origin).get("pictures", pictures) if origin.is_file() else pictures
    same = all(there.get(name) == wanted[name] for name in ("model", "init"))
    return same and kept == pictures and _learned(there) == _learned(wanted)


def fresh(out: str | Path) -> Path:
    """Returns the empty folder of a new short run; removes the files of an older run.

    Raises ValueError if it is not a run's folder, holds checkpoints, or belongs to a running process.
    """
    out = Path(out)
    if not any(path.is_file() and path.name != locks.FILE for path in out.rglob("*")):
        return out
    with locks.held(out):
        _settings(out)
        if _has_checkpoints(out):
            raise ValueError(f"out={str(out)!r}: holds a run with checkpoints; choose another folder, or remove it")
        for path in out.iterdir():
            if path.name != locks.FILE:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with contextlib.suppress(OSError):  # another process may have taken it; `train` reports that
        out.rmdir()
    return out


def check_folder(out: Path, settings: Any, base: str) -> None:
    """Raises ValueError if the folder has a run with another method, data or origin, or other files."""
    if not (out / "config.json").is_file():
        return
    there = _settings(out)
    if not _has_checkpoints(out) and not (out / "export").exists():
        return
    old, new = _learned(there), _learned(to_json(settings))
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"out={str(out)!r}: its run had {name}={old.get(name)!r}, this one has {new.get(name)!r}; choose"
                " another out=DIR"
            )
    origin = out / "origin.json"
    if origin.is_file() and files.read_json(origin).get("base") != base:
        raise ValueError(f"out={str(out)!r}: its run started from another model or picture; choose another out=DIR")


def write_settings(out: Path, settings: Any, base: str, pictures: list | None = None) -> None:
    """Writes config.json and origin.json, each completely or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name, value in (("config", to_json(settings)), ("origin", {"base": base, "pictures": pictures})):
        with files.new_file(out / f"{name}.json") as temporary:
            files.write_json(temporary, value)


def _has_checkpoints(out):
    """Returns whether a run's folder has checkpoints, complete or damaged."""
    return (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir())


def _settings(out):
    """Returns the JSON of a run's settings; raises ValueError if the folder is not a run's."""
    path = out / "config.json"
    found = files.read_json(path) if path.is_file() else None
    if not isinstance(found, dict) or found.get(CLASS) != RUN:
        raise ValueError(f"out={str(out)!r}: holds other files than a run's; choose another out=DIR")
    return found


def _learned(settings):
    """Returns {dotted name: value} of the settings in a run's JSON that must not change between starts."""
    told = {name: settings.get(name, {}) for name in ("method", "data", "class_data")}  # older runs have no class_data
    leaves = jax.tree_util.tree_leaves_with_path(told)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    kept = {name: leaf for name, leaf in named.items() if name.rpartition(".")[2] in ("class", "word", "path")}
    for name in ("data.source.class", "class_data.class"):  # follows from the path
        kept.pop(name, None)
    drawn = told["class_data"].get("draw", False)  # then the model and the prompts decide the pictures
    if drawn or not kept.get("class_data.path"):
        kept.pop("class_data.path", None)
    return {name: os.path.realpath(leaf) if name.endswith(".path") else leaf for name, leaf in kept.items()}


def run_of(source: str | Path) -> tuple[Path, int | None] | None:
    """Returns (folder of the run, step or None) of a run's folder or RUN/checkpoints/STEP; None for anything else."""
    folder, step = Path(source).absolute(), None
    if folder.name.isdecimal() and folder.parent.name == "checkpoints" and folder.is_dir():
        folder, step = folder.parents[1], int(folder.name)
    run = (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()
    return (folder, step) if run else None


# ---- the export, and the start from a file -------------------------------------------------------


def export(
    method: Method,
    frozen: StableDiffusion,
    trained: Any,
    destination: str | Path,
    *,
    facts: Facts | None = None,
    public: bool = False,
    picture: Path | None = None,
    model: str = "MODEL",
    form: str = FOLDER,
    dtype: str = "float32",
) -> tuple[Path, list[str]]:
    """Writes the result of training; returns (path, lines that explain its use).

    Uses the first of the method's formats that can hold the whole adapter.  Otherwise it writes one file each for
    words, edits and hook, and returns the first.  A method without formats gets a model folder.
    facts: for the header of the file and the card next to it, see facts.py; None for no card.  public: without captions
    and names.  picture: a PNG for the card.
    model: name of the base model in the lines.
    form: save_model_as of a run, for a whole model or a ControlNet.  dtype: data type of the numbers in the files;
    words and single numbers stay float32.
    Raises ValueError for values beyond `dtype`.
    """
    destination, narrow = Path(destination), None if dtype == "float32" else dtype
    adapter = method.adapter(frozen, trained)
    adapter = None if adapter is None else replace(adapter, family=frozen.family)
    held = [] if adapter is None else _held(method, adapter)
    name = facts.title if facts is not None and facts.title else "model"
    said = lambda one: {} if facts is None else about.metadata(one, facts, frozen, public)  # noqa: E731
    if adapter is None or not held:
        whole = said(Adapter())
        paths = _whole(method.join(frozen, trained), destination, name, form, narrow, whole)
        for path in paths if facts is not None else ():
            about.card(path, whole, picture)
        return paths[0], _use(paths, method.words, facts) + _read_at(facts)
    if narrow is not None:
        adapter, held = narrowed((adapter, held), narrow)
    told = [said(one) for _, one in held]
    if adapter.model is not None:
        ((kind, _),) = held
        write = lambda sd, folder: kind.write(adapter, folder)  # noqa: E731
        paths = [pipeline.save(adapter.model, destination, extras=[write], about=told[0])]
    else:
        destination.mkdir(parents=True, exist_ok=True)
        paths = [_written(*pair, destination, name, texts, form) for pair, texts in zip(held, told, strict=True)]
    for path, texts in zip(paths, told, strict=True):
        if facts is not None:
            about.seal(path)
            about.card(path, texts, picture)
    lines = [line for path, (kind, one) in zip(paths, held, strict=True) for line in kind.use(path, one, model)]
    return paths[0], lines + _read_at(facts)


def _read_at(facts):
    """Returns a line on a clip skip that the result needs everywhere."""
    skip = 1 if facts is None else facts.clip_skip
    return [f"everywhere with clip skip {skip}, as it was trained; here --clip-skip {skip}"] if skip > 1 else []


def _written(kind, adapter, destination, name, told, form):
    """Writes an adapter in one format or, for a ControlNet, in those of `form`; returns the path of the first."""
    written = [] if form == SINGLE else [kind.write(adapter, destination, told)]
    if form != FOLDER:
        written.append(kind.single(adapter, destination / f"{name}.safetensors", told))
    return written[0]


def _whole(sd, destination, name, form, dtype, told):
    """Writes a whole model in the formats of `form`; returns their paths, the folder first."""
    paths = []
    if form != SINGLE:
        paths.append(pipeline.save(sd, destination, dtype=dtype, about=told))
    if form != FOLDER:
        destination.mkdir(parents=True, exist_ok=True)
        paths.append(pipeline.save_single(sd, destination / f"{name}.safetensors", dtype, told)[0])
    return paths


def narrowed(tree: Any, dtype: str) -> Any:
    """Returns a tree with its floats as numpy arrays of `dtype`; numbers of one value stay, such as LoRA's alpha.

    Raises ValueError for values beyond `dtype`.
    """

    def change(x):
        if not np.ndim(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        try:
            with np.errstate(over="raise"):
                return np.asarray(x).astype(jnp.dtype(dtype))
        except FloatingPointError:
            raise SettingError("save_precision", dtype, "float32", "trained weights are too large for it") from None

    return jax.tree.map(change, tree)


def _held(method, adapter):
    """Returns [(Format, its part of the adapter)], [] if the method's formats cannot hold all of it."""
    known = kinds.known()

    def fitting(one):
        return next((known[name] for name in method.formats if known[name].holds(one)), None)

    whole = fitting(adapter)
    if whole is not None:
        return [(whole, adapter)]
    none = {"edits": {}, "words": {}, "hook": None}
    parts = [replace(adapter, **{**none, name: getattr(adapter, name)}) for name in none if getattr(adapter, name)]
    if parts and parts[0].edits and fitting(parts[0]) is None:
        parts[:1] = _by_kind(parts[0], fitting)
    found = [(kind, one) for one in parts if (kind := fitting(one)) is not None]
    return found if len(found) == len(parts) and not adapter.trees else []


def _by_kind(adapter, fitting):
    """Returns an adapter's edits as one adapter for each format that holds some of them."""
    groups = {}
    for part, edits in adapter.edits.items():
        for name, edit in edits.items():
            kind = fitting(replace(adapter, edits={part: {name: edit}}))
            groups.setdefault(kind and kind.name, {}).setdefault(part, {})[name] = edit
    return [replace(adapter, edits=edits) for edits in groups.values()]


def _use(paths, words, facts):
    """Returns lines on the use of a model's folder and single file; words: the placeholders in the folder."""
    quoted, said = shlex.quote(str(paths[0])), words or (facts.words if facts is not None else ())
    prompt, program, lines = f"a photo of {said[0]}" if said else "TEXT", "text2img", []
    if paths[0].is_dir():
        pipe = files.read_json(paths[0] / INDEX)["_class_name"]
        program = PROGRAMS.get(pipe, program)
        lines.append(f'diffusers  {pipe}.from_pretrained("{paths[0]}")')
    there = f"python -m sdjax.convert {quoted} NAME.safetensors"
    if paths[-1].is_file():
        there = f"copy {paths[-1]} to models/Stable-diffusion/"
    beside = "; each word is a file beside it, and there the file's name" if words else ""
    here = f'here       python -m sdjax {program} --model {quoted} --prompt "{prompt}"'
    return [here, *lines, f"A1111      {there}{beside}"]


def start(
    method: Method, trained: Any, frozen: StableDiffusion, source: str, opened: tuple[Format, Adapter]
) -> tuple[Any, StableDiffusion]:
    """Returns (trained, frozen) with a file's weights as initial values; opened: the result of formats' `opened`.

    Raises SettingError or ValueError if no part of the method can start from the file, or it does not fit.
    """
    kind, adapter = opened
    parts = [("", "", method)]
    if isinstance(method, Chain) and adapter.about.get("method") != "Chain":  # a file of one part, not of a chain
        parts = [(f"parts.{i}", str(i), part) for i, part in enumerate(method.parts)]
    able = [(name, key, part) for name, key, part in parts if kind.name in part.formats]
    if not able:
        wanted = ", ".join(method.formats)
        said = f"of the kind {wanted}" if wanted else "'', and the trained model as model="
        raise SettingError("init", source, f"{said}: {type(method).__name__} does not start from the kind {kind.name}")
    for name, key, part in able:
        tree = trained[key] if key else trained
        try:
            with prefixed("method"), prefixed(name):
                tree, frozen = kind.start(adapter, part, tree, frozen)
        except SettingError:
            raise
        except ValueError as error:
            raise ValueError(f"init={source!r}: {error}") from None
        trained = {**trained, key: tree} if key else tree
    return trained, frozen


def drawn(tree: Any, method: Method, sd: StableDiffusion, key: jax.Array) -> Any:
    """Returns a trained tree with random values for shapes that the file did not fill, as in a fresh run."""
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        return tree
    fresh, _ = method.split(sd, key)
    return jax.tree.map(lambda x, new: new if isinstance(x, jax.ShapeDtypeStruct) else x, tree, fresh)
