"""OpenCLIP's vision towers: their names and sizes, in a hub's file, a local file, or as a part of another file.

    network, params = read(found("folder"))                    # open_clip_pytorch_model.bin or .safetensors
    config, view = tower(weights, "clip_vision.", "ViT-H-14::laion2b_s32b_b79k")

Source of the names: OpenCLIP, transformer.py, VisionTransformer; of the sizes: its model_configs/.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sdjax.formats.models import infer_config, single_file
from sdjax.formats.storage import checkpoints, files, ldm_names, parameters
from sdjax.models.clip import ImageConfig, ImageEncoder
from sdjax.runtime.guard import named
from sdjax.trees import Tree

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
PATTERNS = [[CONFIG, name] for name in WEIGHTS]  # of a hub repository
PREFIX = "visual."
MARK = "conv1.weight"
PROJECTION = "visual_projection.weight"
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # ViT-H-14, ViT-g-14, ViT-bigG-14; narrower towers have 64


@dataclasses.dataclass(frozen=True)
class Tower:
    """The weights of a tower under our names, a files.Stored; transposes OpenCLIP's projection."""

    view: single_file.View

    @property
    def path(self) -> str | pathlib.Path:
        return self.view.path

    @property
    def names(self) -> Collection[str]:
        return self.view.names

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.view.shape(name)
        return shape[::-1] if name == PROJECTION else shape

    def dtype(self, name: str) -> str:
        return self.view.dtype(name)

    def read(self, name: str) -> np.ndarray:
        array = self.view.read(name)
        return array.T if name == PROJECTION else array


def found(source: str | pathlib.Path) -> pathlib.Path | None:
    """Returns the path of an OpenCLIP file: `source` itself or a file in this folder; None without one."""
    path = pathlib.Path(source)
    if path.is_dir():
        return next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if not path.is_file() or path.suffix not in (".bin", ".pt", ".safetensors"):
        return None
    return path if PREFIX + MARK in checkpoints.opened(path)[0].names else None


def read(path: pathlib.Path, dtype: DTypeLike | None = "float32") -> tuple[ImageEncoder, Tree]:
    """Returns (network, parameters) of the vision tower in an OpenCLIP file, with the config next to it, if any.

    Raises ValueError in one line, naming the file, for a file without a tower and for an unsupported tower.
    """
    weights = checkpoints.opened(path)[0]
    beside = path.parent / CONFIG
    told = files.read_json(beside).get("model_cfg", {}) if beside.is_file() else {}
    with named(beside if told else path):
        config, view = tower(weights, PREFIX, told)
    network = ImageEncoder(config, jnp.dtype(dtype or "float32"))
    with named(path):
        return network, parameters.read(view, network, "image_encoder", dtype, (PROJECTION,))


def tower(weights: files.Stored, prefix: str, told: Mapping[str, Any] | str = "") -> tuple[ImageConfig, Tower]:
    """Returns (config, weights under our names) of the vision tower whose names begin with a prefix.

    told: model_cfg of its config, or its name "ARCH::WEIGHTS", as in the unofficial E4T.  It gives the width of a head
    and OpenAI's quick_gelu, which shapes do not show.
    A tower without a projection lacks that name here; parameters.read can fill it with zeros.
    """
    shapes = {name.removeprefix(prefix): weights.shape(name) for name in weights.names if name.startswith(prefix)}
    if MARK not in shapes:
        raise ValueError(f"{weights.path}: no weight {prefix}{MARK}: holds no vision tower of OpenCLIP")
    with named(weights.path):
        config = _config(shapes, told)
    modules = ldm_names.open_clip_vision_modules(config)
    places = {}
    for name in parameters.file_names(parameters.template(ImageEncoder(config))):
        place, part = ldm_names.rename(name, modules), name.split(".")[-2]
        if place in shapes:
            third = (single_file.QKV[part], None) if part in single_file.QKV else None
            places[name] = (prefix + place, third)
    unknown = set(shapes) - {place.removeprefix(prefix) for place, _ in places.values()}
    view = single_file.View(weights, places | {name: (prefix + name, None) for name in unknown})
    return config, Tower(view)


def _config(shapes: Mapping[str, tuple[int, ...]], told: Mapping[str, Any] | str) -> ImageConfig:
    """Returns the config of a tower with weights of these shapes."""
    width, _, patch, other = infer_config.shape_of(shapes, MARK, 4)
    if patch != other:
        raise ValueError(f"patches of {patch} x {other} pixels; expected squares")
    side = round((infer_config.shape_of(shapes, "positional_embedding", 2)[0] - 1) ** 0.5)
    layers = 0
    while f"transformer.resblocks.{layers}.mlp.c_fc.weight" in shapes:
        layers += 1
    vision = told.get("vision_cfg", {}) if isinstance(told, Mapping) else {}
    head = vision.get("head_width") or HEAD_WIDTHS.get(width, infer_config.HEAD_WIDTH)
    quick = told.get("quick_gelu") if isinstance(told, Mapping) else "quickgelu" in told or told.endswith("::openai")
    return ImageConfig.from_json({
        "hidden_size": width,
        "intermediate_size": infer_config.shape_of(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // head),
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": "quick_gelu" if quick else "gelu",
        "projection_dim": shapes["proj"][1] if len(shapes.get("proj", ())) == 2 else ImageConfig.projection_dim,
    })  # fmt: skip
