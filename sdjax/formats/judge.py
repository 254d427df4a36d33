"""Loads a CLIP that judges pictures: an image encoder and, for texts, a text encoder with its projection.

judge = load("openai/clip-vit-base-patch32")             # or a folder, "pocket", OpenCLIP's file
likeness.clip_i(judge, made, own)                        # methods/likeness.py
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from sdjax.formats import pipeline
from sdjax.formats.models import folder, single_file
from sdjax.formats.storage import files, parameters
from sdjax.methods.clip import ENCODER
from sdjax.models.clip import TextConfig, TextEncoder
from sdjax.models.reference import Reference
from sdjax.runtime.guard import named
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.text.tokenizer import Tokenizer

IMAGE = "image_encoder"
TEXTS = "text_model."  # names of a CLIPModel's text tower
TOP = ("text_projection.weight", "logit_scale")  # its names outside of the towers


def load(source: str | pathlib.Path) -> StableDiffusion:
    """Returns a StableDiffusion without unet and vae that judges pictures in float32.

    source: a folder or hub id of a CLIPModel, a model with an image encoder such as "pocket", or any source of an image
    encoder that pipeline.load takes as `vision`.
    Without a text projection it has no text encoder; a model's projection is in its folder clip/.
    Raises SettingError named "judge" for a source without an image encoder.
    """
    try:
        return _load(source)
    except ValueError as error:
        raise SettingError("judge", str(source), "a CLIPModel, or a model with an image encoder", str(error)) from None


def of(sd: StableDiffusion) -> StableDiffusion | None:
    """Returns a model's own CLIP as a judge; None without an image encoder."""
    if IMAGE not in sd.parts:
        return None
    names = [IMAGE, ENCODER] if sd.reference.clip is not None else [IMAGE]
    return _judge({name: (sd.networks[name], sd.parts[name]) for name in names}, sd.tokenizers, sd.reference.clip)


def _load(source):
    if str(source).startswith(("random:", "new:")) or (pathlib.Path(source) / folder.INDEX).is_file():
        return _own(pipeline.load(source), source)
    if pathlib.Path(source).is_file():
        return _judge({IMAGE: pipeline.load_vision(source, "float32")})
    place = pipeline.locate(source, more=pipeline.VISION)
    if (place / folder.INDEX).is_file():
        return _own(pipeline.load(place), source)
    towers = {IMAGE: pipeline.load_vision(place, "float32")}
    config = files.read_json(place / "config.json") if (place / "config.json").is_file() else {}
    if config.get("text_config") is None:
        return _judge(towers)
    with named(place):
        text, clip = _texts(place, towers[IMAGE][0].config.projection_dim)
        return _judge({**towers, ENCODER: text}, {ENCODER: Tokenizer.load(place)}, clip)


def _own(sd, source):
    """Returns the CLIP of a loaded model."""
    judge = of(sd)
    if judge is None:
        raise ValueError(f"{source} has none")
    return judge


def _texts(place, width):
    """Returns ((network, parameters) of a CLIPModel's text tower, its projection and temperature as Reference.clip)."""
    network = TextEncoder(folder.read_config(place / "config.json", _text_config))
    weights = files.open_weights(place, "model")
    tower = {name: (name, None) for name in weights.names if name.startswith(TEXTS)}
    params = parameters.read(single_file.View(weights, tower), network, ENCODER, "float32")
    like = {
        "text_projection": {"kernel": jax.ShapeDtypeStruct((network.config.hidden_size, width), jnp.float32)},
        "logit_scale": jax.ShapeDtypeStruct((), jnp.float32),
    }
    top = single_file.View(weights, {name: (name, None) for name in TOP if name in weights.names})
    return (network, params), parameters.read_tree(top, like, "float32")


def _text_config(values: dict[str, Any]) -> TextConfig:
    return TextConfig.from_json(values["text_config"])


def _judge(towers, tokenizers=None, clip=None):
    """Returns the StableDiffusion of {part: (network, parameters)}."""
    return StableDiffusion(
        {name: params for name, (_, params) in towers.items()},
        networks=FrozenDict({name: network for name, (network, _) in towers.items()}),
        tokenizers=FrozenDict(tokenizers or {}) if clip is not None else FrozenDict(),
        reference=Reference(clip=clip),
    )
