"""Names and hashes of the files behind a picture, for records.

    names, hashes = of(sd, TextToImage(prompt="a", model="v1-5.safetensors", adapter=("ink.safetensors:0.8",)))

Source of the hashes: AUTOMATIC1111's stable-diffusion-webui 1.10, modules/hashes.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdjax.formats import pipeline
from sdjax.formats.adapters import attach
from sdjax.formats.models import autoencoder
from sdjax.formats.storage.hashes import autov2, sha256
from sdjax.sampling.fields import fields
from sdjax.sampling.settings import Task
from sdjax.service.request import adapters_of
from sdjax.stable_diffusion import StableDiffusion
from sdjax.text.grammars import Wanted


def of(sd: StableDiffusion, made: Task, named: dict[str, Path] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns ({setting: name} of the settings that name files, {"model", "vae", "lora ink" ...: hash}).

    Names: files without folder, models also without suffix, hub ids, and built-in models.
    named: {"lora ink": file, "embedding cat": file} of the prompts, see adapters_named; these get hashes only.
    """
    names = {}
    for name, field in fields(type(made)).items():
        value = getattr(made, name)
        if field.about.file and value:
            names[name] = tuple(Path(one).name for one in value) if field.several else Path(value).name
    names["model"], found = _model(made.model)
    hashes, shown = {"model": found} if found else {}, []
    if made.vae is not None:
        names["vae"] = _name(made.vae)
        hashes["vae"] = model_hash(made.vae if Path(made.vae).is_file() else autoencoder.locate(made.vae))
    for one, by_name in adapters_of(made):
        if by_name:  # `named` has its hash
            shown.append(one)
            continue
        file, strength, word = attach.split(one)
        kind, path = attach.kind(file)
        called = word or attach.name_of(file if attach.is_hub_id(file) else path)
        hashes[f"{kind.called} {called}"] = kind.digest(path)
        shown.append(f"{called}:{strength:g}")
    return names | ({"adapter": tuple(shown)} if shown else {}), hashes | of_adapters(named or {})


def adapters_named(
    sd: StableDiffusion, wanted: Iterable[Wanted], texts: Iterable[str], folder: attach.Folder, grammar: str
) -> dict[str, Path]:
    """Returns {"lora ink": file, ...} of the wanted adapters and of embeddings in the texts, from a folder.

    texts: prompts and negative prompts in a grammar.
    """
    found = {f"{one.kind} {one.name}": attach.find(folder, one.name) for one in wanted}
    words, _ = attach.find_embeddings(sd, texts, folder, grammar)
    return found | {f"{attach.kind(path)[0].called} {word}": path for word, path in words.items()}


def of_adapters(named: Mapping[str, Path]) -> dict[str, str]:
    """Returns {"lora ink": hash, ...} for the result of adapters_named."""
    return {name: digest(path) for name, path in named.items()}


def digest(source: str | Path) -> str:
    """Returns the hash of an adapter file or folder for records."""
    kind, path = attach.kind(source)
    return kind.digest(path)


def built_in(model: str) -> bool:
    """Returns whether a name means a built-in model."""
    return model == "pocket" or model.partition(":")[0] in ("random", "new")


def kept_model(said: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, str | None]:
    """Returns {"model": name} if a record's model is built in, {"model": None} for another, {} without one.

    hashes: the record's hashes.
    """
    name = said.get("model") or ""
    if built_in(name):
        return {"model": name}
    return {"model": None} if name or "model" in hashes else {}


def _model(source):
    if built_in(source):
        return source, model_hash(pipeline.locate(source)) if source == "pocket" else None
    return _name(source), model_hash(source if Path(source).is_file() else pipeline.locate(source))


def _name(source):
    path = Path(source)
    return path.stem if path.is_file() else path.resolve().name if path.is_dir() else str(source)


# ---- hashes ------------------------------------------------------------------------------------


def model_hash(path: str | Path) -> str:
    """Returns 10 hex digits that identify a model: of a checkpoint's SHA-256, as A1111 and Civitai show it.

    For a folder they are of the names and hashes of its weight files, a rule of ours.
    Raises ValueError for a missing file or a folder without weights.
    """
    path = Path(path)
    if path.is_file():
        return autov2(path)
    files = sorted(path.rglob("*.safetensors"), key=lambda file: file.relative_to(path).as_posix())
    if not files:
        raise ValueError(f"{path}: no such file; expected a file or a folder with .safetensors files")
    lines = "".join(f"{sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:10]
