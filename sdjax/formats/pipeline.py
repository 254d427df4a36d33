"""Loads whole models from diffusers folders, single files, hub ids and built-in shapes; saves what diffusers loads.

sd = load("pocket")                                      # or "folder", "v1-5.ckpt", "owner/name", "random:sd15"
sd = load("folder", "float16", vision="openai/clip-vit-large-patch14")
save(sd, "out")                                          # StableDiffusionPipeline.from_pretrained("out")
save(sd, "out.safetensors", "single-file")               # one checkpoint, for A1111 and ComfyUI
"""

import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict

from sdjax import trees
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.families.sd import Sd
from sdjax.formats.adapters import e4t, embeddings
from sdjax.formats.adapters.learned_embeds import beside
from sdjax.formats.models import autoencoder, folder, lpips, open_clip, presets, single_file
from sdjax.formats.storage import files, headers, parameters
from sdjax.models.clip import ImageConfig, ImageEncoder
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.text.tokenizer import Tokenizer, byte_vocabulary

POCKET = pathlib.Path(__file__).parents[1] / "pocket"
DTYPES = ("float32", "float16", "bfloat16")  # of weights in files and of networks that sample
FORMATS = ("diffusers", "single-file")
VISION = open_clip.PATTERNS  # further hub files that may hold an image encoder
HUGGING_FACE = ("model*.safetensors", "pytorch_model*.bin")  # transformers' weights


def locate(source: str | pathlib.Path, variant: str | None = None, more: Iterable[list[str]] = ()) -> pathlib.Path:
    """Returns the local folder of "pocket", a folder or a hub id (fetched into the hub's cache).

    more: further lists of hub files, fetched in turn until one holds weights.
    Raises ValueError naming a source that does not exist.
    """
    if str(source) == "pocket":
        source = POCKET
    if str(source).startswith("random:"):
        raise ValueError(f"model {str(source)!r}: a built-in shape has no folder; save it first")
    kinds = [f".{variant}"] if variant else ["", ".fp16"]
    patterns = [folder.patterns(kind, ending) for ending in ("safetensors", "bin") for kind in kinds] + list(more)
    enough = ("*.safetensors", *(HUGGING_FACE if more else ()))
    return files.locate(source, patterns, lambda place: any(map(any, map(place.rglob, enough))))


# ---- loading -----------------------------------------------------------------------------------


def load(
    source: str | pathlib.Path,
    dtype: str | None = "float32",
    *,
    variant: str | None = None,
    vision: str | pathlib.Path | None = None,
    perceptual: str | pathlib.Path | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
    tokenizer: str | pathlib.Path | None = None,
    vae: str | pathlib.Path | None = None,
) -> StableDiffusion:
    """Returns the StableDiffusion of a diffusers folder, a single-file checkpoint, a hub id "owner/name", "pocket",
    "random:NAME" or "new:NAME".

    dtype: data type of weights and computation ("float32", "float16", "bfloat16"); None keeps the stored types and
    computes in float32.  variant: "fp16" selects those files of a folder.
    vision: source of the image encoder: a folder or hub id of a CLIPModel or CLIPVisionModel, a model with an image
    encoder, OpenCLIP's file, folder or hub id, or "random:vit-l", "random:vit-h".
    perceptual: LPIPS' weights for training autoencoders: one file, or two separated by a comma (lpips.read).
    prediction_type, ema, tokenizer: for a single file only, see single_file.read.
    vae: source of another autoencoder: a file, folder or hub id (autoencoder.put).
    A folder whose e4t/ holds a picture gets E4T's encoder for it.  Loading needs memory for the weights and a few
    tensors.
    Raises ValueError in one line that names the file and what is missing, unknown or does not fit.
    """
    if dtype not in (*DTYPES, None):
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    kind, _, shape = str(source).partition(":")
    if os.path.isfile(source):
        whole = single_file.read(source, dtype, prediction_type=prediction_type, ema=ema, tokenizer=tokenizer)
        sd = folder.assemble(*whole[:5]).replace(low_schedule=whole[5])
    elif prediction_type or ema or tokenizer:
        given = {"ema": ema, "prediction_type": prediction_type, "tokenizer": tokenizer}
        name = next(name for name in given if given[name])
        raise SettingError(name, given[name], "a single file such as v1-5.safetensors", f"{source} is not one")
    elif kind in ("random", "new") and shape:
        sd = _built_in(kind, shape, dtype or "float32")
    else:
        place = locate(source, variant)
        sd = e4t.attached(folder.read(place, dtype, variant), place)
    if vae is not None:
        sd = autoencoder.put(sd, vae, dtype)
    if vision is not None:
        network, params = load_vision(vision, dtype, variant)
        # The text projection is useless with another image encoder.
        sd = sd.with_reference(clip=None).with_networks(image_encoder=network).with_parts(image_encoder=params)
    if perceptual is not None:
        sd = sd.with_reference(lpips=lpips.read(perceptual, dtype))
    return sd


def load_vision(
    source: str | pathlib.Path, dtype: str | None, variant: str | None = None
) -> tuple[ImageEncoder, trees.Tree]:
    """Returns (network, parameters) of an image encoder; arguments as `vision`, `dtype` and `variant` of load."""
    if str(source).startswith("random:"):
        name = str(source).removeprefix("random:")
        if name not in presets.TOWERS:
            raise ValueError(f"vision={str(source)!r}: expected one of {_known(presets.TOWERS)}")
        network = ImageEncoder(ImageConfig(**presets.TOWERS[name]), jnp.dtype(dtype or "float32"))
        return network, parameters.random_parameters(network, dtype or "float32")
    if os.path.isfile(str(source).split(",")[0]) and open_clip.found(source) is None:
        raise ValueError(f"vision={source}: expected a folder or hub id with an image encoder, not a file")
    place = pathlib.Path(source) if os.path.isfile(source) else locate(source, variant, VISION)
    if (file := open_clip.found(place)) is not None and not any(map(any, map(place.glob, HUGGING_FACE))):
        return open_clip.read(file, dtype)
    if not (place / "config.json").is_file() and (place / "image_encoder").is_dir():
        place = place / "image_encoder"
    config = folder.read_config(place / "config.json", _tower)
    network = ImageEncoder(config, jnp.dtype(dtype or "float32"))
    # A CLIPVisionModel has no projection: its embeddings are zero, but its class tokens are complete.
    bare = "CLIPVisionModel" in (files.read_json(place / "config.json").get("architectures") or ())
    weights = files.open_weights(place, "model", variant)
    return network, parameters.read(
        weights, network, "image_encoder", dtype, ("visual_projection.weight",) if bare else ()
    )


def _tower(values):
    """Returns the ImageConfig of a vision tower's config.json, or of a CLIPModel's with both towers."""
    if values.get("vision_config") is not None:
        values = {**values["vision_config"], "projection_dim": values.get("projection_dim", 512)}
    return ImageConfig.from_json(values)


def _known(table):
    return ", ".join(f"random:{name}" for name in table)


def shape(name: str) -> StableDiffusion:
    """Returns a built-in shape such as "sd15" with shapes as parameters, to check adapter files against."""
    return _built_in("shape", name, "float32")


def _built_in(kind, name, dtype):
    """Returns a built-in shape.

    kind: "random" weights without zeros, "new" initial weights for training, or "shape" only.
    """
    if name not in presets.SHAPES:
        raise ValueError(f"model '{kind}:{name}': expected one of {_known(presets.SHAPES)}")
    shape = presets.SHAPES[name]
    tokenizer = _tokenizer(**shape["tokenizer"])
    text: dict[str, Any] = {"vocab_size": tokenizer.size, "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    text |= {"pad_token_id": tokenizer.pad}
    family = Sd()
    given = {**shape, "text_encoder": {**shape["text_encoder"], **text}}
    there = {name: part for name, part in family.parts.items() if name in shape}
    networks = {name: part.network(part.config(**given[name]), jnp.dtype(dtype)) for name, part in there.items()}
    make = {
        "random": parameters.random_parameters,
        "new": parameters.new_parameters,
        "shape": lambda network, dtype: parameters.template(network),
    }[kind]
    params = {part: make(network, dtype) for part, network in networks.items()}
    return folder.assemble(family, networks, params, Schedule(**shape["schedule"]), {"text_encoder": tokenizer})


def _tokenizer(size=0, length=77, texts=None, pad="<|endoftext|>", folder=None):
    if folder is not None:
        return Tokenizer.load(POCKET.parent / folder)
    if texts is None:
        return Tokenizer.of(*byte_vocabulary(size), length, pad)
    return Tokenizer.train(texts, size, length)


# ---- saving ------------------------------------------------------------------------------------


def save(
    sd: StableDiffusion,
    destination: str | pathlib.Path,
    format: str = "diffusers",
    *,
    dtype: str | None = None,
    shard_size: int = files.SHARD_SIZE,
    extras: Iterable[Callable[[StableDiffusion, pathlib.Path], object]] = (),
    about: Mapping[str, str] = FrozenDict(),
) -> pathlib.Path:
    """Writes a folder that diffusers' from_pretrained loads bit for bit, completely or not at all; returns its path.

    format: "diffusers", or "single-file" for one checkpoint (single_file.write), without shards and extras.
    dtype: data type in the files; None keeps each weight's own.  shard_size: most bytes of weights per file.
    extras: functions (sd, folder) that add folders such as e4t/ before the new folder is renamed into place.
    about: metadata for a single file's header or a folder's metadata.json.
    Replaces an old model at the destination and keeps files that are not part of a model, such as README.md.
    Merges hooks into weights if they allow it.
    Raises ValueError if other hooks, conditioners or ControlNets hold weights that the files would lack, or if the
    destination holds something else.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    if dtype not in (*DTYPES, None):
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    sd = sd.with_dtype(jnp.float32).fold() if sd.hooks else sd
    if sd.hooks or sd.conditioners or sd.wrappers:
        held = ", ".join(type(item).__name__ for item in (*sd.hooks, *sd.conditioners, *sd.wrappers))
        raise ValueError(f"{destination}: the model computes with {held} beside its weights; merge before saving")
    if format == "single-file":
        return single_file.write(sd, destination, dtype, about)
    describe = lambda sd, place: headers.describe(place, about)  # noqa: E731
    return folder.write(sd, destination, dtype, shard_size, [*extras, describe])


def save_single(
    sd: StableDiffusion,
    path: str | pathlib.Path,
    dtype: str | None = None,
    about: Mapping[str, str] = FrozenDict(),
) -> tuple[pathlib.Path, dict[str, pathlib.Path]]:
    """Writes one checkpoint for A1111 and ComfyUI; returns (its path, {word: the file of its embedding beside it}).

    A single file holds no words, no image encoder and nothing of E4T.  about: see `save`, whose ValueErrors it raises.
    """
    sd, words = embeddings.taken(sd) if sd.words else (sd, {})
    path = save(sd, path, "single-file", dtype=dtype, about=about)
    places = beside(path, words)
    return path, {word: embeddings.write(place, {word: words[word]}, sd.family) for word, place in places.items()}
