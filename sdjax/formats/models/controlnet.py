"""ControlNet files: a diffusers folder, or one file with the ControlNet repository's or diffusers' names.

    control = load_control("folder")                       # config.json and diffusion_pytorch_model.safetensors
    control = load_control("control_sd15_canny.pth")       # or .safetensors
    control = load_control("random:sd15")                  # a built-in shape with random weights
    save_control(control, "folder")
    save_control(control, "canny.safetensors")             # one file with the ControlNet repository's names

Source of the names: the ControlNet repository's cldm/cldm.py, and diffusers' ControlNetModel.
"""

import json
import os
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from sdjax.formats.models import infer_config, presets, single_file
from sdjax.formats.models.folder import WRITTEN_AS, read_config
from sdjax.formats.storage import checkpoints, files, headers, ldm_names, parameters
from sdjax.models.controlnet import ControlNet, ControlNetConfig
from sdjax.models.unet import UNetConfig
from sdjax.runtime.guard import named
from sdjax.sampling.control import Control

STEM = "diffusion_pytorch_model"
PREFIX = "control_model."  # files of version 1.0 also contain the whole model
CLASS = "ControlNetModel"
ENDINGS = (".safetensors", ".pth", ".ckpt", ".pt", ".bin")  # of single files
MARKS = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")
ARCHITECTURES = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}  # by context width; ModelSpec 1.0.1
NOTES = "sdjax.controlnet"  # metadata key of the config, since the weights do not show all of it


def load_control(
    source: str | pathlib.Path, dtype: DTypeLike | None = "float32", *, variant: str | None = None
) -> Control:
    """Returns the Control of a diffusers folder, a hub id, one file, or a built-in shape "random:NAME".

    dtype, variant: as in pipeline.load.  A file with diffusers' names needs its config.json beside it.
    Raises ValueError in one line, naming the file and the parts that are missing, unknown or do not fit.
    """
    if str(source).startswith("random:"):
        return _random(str(source).removeprefix("random:"), dtype)
    with named(source):
        return _load(source, dtype, variant)


def _load(source: str | pathlib.Path, dtype: DTypeLike | None, variant: str | None) -> Control:
    path = pathlib.Path(source)
    if path.is_file():
        weights, metadata, _ = checkpoints.opened(path)
        if any("input_hint_block." in name for name in weights.names):
            return _control(*_original(weights, metadata), dtype)
        return _control(weights, _config(path.parent), dtype)
    kinds = [f".{variant}"] if variant else ["", ".fp16"]
    wanted = [["config.json", f"{STEM}{kind}.{ending}"] for ending in ("safetensors", "bin") for kind in kinds]
    folder = files.locate(source, wanted, lambda folder: any(folder.glob("*.safetensors")))
    return _control(files.open_weights(folder, STEM, variant), _config(folder), dtype)


def save_control(
    control: Control,
    destination: str | pathlib.Path,
    *,
    dtype: DTypeLike | None = None,
    about: Mapping[str, str] = FrozenDict(),
) -> pathlib.Path:
    """Writes the folder that diffusers' ControlNetModel.from_pretrained loads; returns its path.

    A destination that ends in .safetensors becomes one file with the ControlNet repository's names, for A1111 and
    ComfyUI.
    about: metadata of its training, as in pipeline.save.
    """
    tensors = parameters.write(control.params, dtype)
    if str(destination).endswith(".safetensors"):
        return _write_original(tensors, control.network.config, pathlib.Path(destination), about)
    size, mark = sum(tensor.bytes for tensor in tensors.values()), "config.json"
    with files.new_folder(destination, mark, (mark, f"{STEM}.safetensors", headers.NAME), size) as folder:
        files.write_weights(folder, STEM, tensors)
        config = {**control.network.config.to_json(), "_diffusers_version": WRITTEN_AS}
        files.write_json(folder / mark, config)
        headers.describe(folder, about)
    return pathlib.Path(os.path.realpath(destination))


def is_control(source: str | pathlib.Path) -> bool:
    """Returns whether a local source is a ControlNet, by a folder's config.json or a file's tensor names.

    Raises ValueError for a file that cannot be read.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        config = path / "config.json"
        return config.is_file() and files.read_json(config).get("_class_name") == CLASS
    if path.suffix not in ENDINGS or not path.is_file():
        return False
    return any(name.endswith(MARKS) for name in checkpoints.opened(path)[0].names)


def _control(weights: files.Stored, config: ControlNetConfig, dtype: DTypeLike | None) -> Control:
    network = ControlNet(config, jnp.dtype(dtype or "float32"))
    return Control(parameters.read(weights, network, "controlnet", dtype), network)


def _config(folder: pathlib.Path) -> ControlNetConfig:
    return read_config(folder / "config.json", ControlNetConfig.from_json)


def _random(name: str, dtype: DTypeLike | None) -> Control:
    """Returns the Control of a built-in shape with random weights; no kernel is zero."""
    if name not in presets.SHAPES:
        raise ValueError(f"control 'random:{name}': expected one of {', '.join(f'random:{n}' for n in presets.SHAPES)}")
    shape = presets.SHAPES[name]
    factor = 2 ** (len(shape["vae"]["block_out_channels"]) - 1)
    network = ControlNet(ControlNetConfig.of(UNetConfig(**shape["unet"]), factor), jnp.dtype(dtype or "float32"))
    return Control(parameters.random_parameters(network, dtype or "float32"), network)


# ---- the original names --------------------------------------------------------------------------


def _write_original(
    tensors: dict[str, files.Tensor], config: ControlNetConfig, path: pathlib.Path, about: Mapping[str, str]
) -> pathlib.Path:
    """Writes one file with the ControlNet repository's names and the prefix control_model.; returns its path."""
    table = modules(config)
    renamed = {PREFIX + ldm_names.rename(name, table): tensor for name, tensor in tensors.items()}
    told = {"modelspec.title": path.stem, **about}
    if config.unet.cross_attention_dim in ARCHITECTURES:
        architecture = f"{ARCHITECTURES[config.unet.cross_attention_dim]}/controlnet"
        told |= {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": architecture,
                 "modelspec.implementation": "https://github.com/lllyasviel/ControlNet"}  # fmt: skip
    metadata = {"format": "pt", NOTES: json.dumps(config.to_json()), **told, **headers.unsealed()}
    with files.new_file(path) as temporary:
        files.write_safetensors(temporary, renamed, metadata)
        headers.seal_new(temporary)
    return path


def _original(weights: files.Stored, metadata: dict[str, str]) -> tuple[files.Stored, ControlNetConfig]:
    """Returns (weights under our names, config) of a file with the ControlNet repository's names."""
    prefix = PREFIX if any(name.startswith(PREFIX) for name in weights.names) else ""
    there = {name.removeprefix(prefix): name for name in weights.names if name.startswith(prefix)}
    found = {name: weights.shape(place) for name, place in there.items()}
    try:
        config = _noted(metadata[NOTES]) if NOTES in metadata else _found_config(found)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from None
    table = modules(config)
    ours = parameters.file_names(parameters.template(ControlNet(config)))
    places = {name: there[place] for name in ours if (place := ldm_names.rename(name, table)) in there}
    unknown = set(there.values()) - set(places.values())
    known = {name: (place, None) for name, place in places.items()}
    return single_file.View(weights, known | {name: (name, None) for name in unknown}), config


def _noted(text: str) -> ControlNetConfig:
    """Returns the config in a file's metadata."""
    try:
        return ControlNetConfig.from_json(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"metadata {NOTES}: {next(iter(str(error).splitlines()), 'unread')}") from None


def modules(config: ControlNetConfig) -> dict[str, str]:
    """Returns {our module: the repository's} for this ControlNetConfig."""
    table = ldm_names.unet_modules(config.unet)
    hint = "controlnet_cond_embedding"
    blocks = 2 * (len(config.conditioning_embedding_out_channels) - 1)
    table[f"{hint}.conv_in"] = "input_hint_block.0"
    table |= {f"{hint}.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(blocks)}
    table[f"{hint}.conv_out"] = f"input_hint_block.{2 * blocks + 2}"
    maps = sum(n + 1 for n in config.unet.levels("layers_per_block"))
    table |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(maps)}
    return table | {"controlnet_mid_block": "middle_block_out.0"}


def _found_config(found: dict[str, tuple[int, ...]]) -> ControlNetConfig:
    """Returns the ControlNetConfig of weights with these shapes, {name: shape}."""
    widths, place = [found["input_hint_block.0.weight"]], 4
    while f"input_hint_block.{place + 2}.weight" in found:
        widths.append(found[f"input_hint_block.{place}.weight"])
        place += 4
    unet = infer_config.unet_config(found | {"out.2.weight": (4,)})  # a ControlNet has no up half
    options = {
        "conditioning_channels": widths[0][1],
        "conditioning_embedding_out_channels": tuple(w[0] for w in widths),
    }
    return ControlNetConfig.of(unet, 1, **options)
