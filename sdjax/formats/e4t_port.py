"""Reads the folders of the unofficial E4T (mkshing), whose face encoder is the only public one; never writes them.

    config.json          its settings; after tuning, the settings of pre-training in "pretrained_args"
    encoder.pt           the head (methods/heads/tokens.py) and, as clip_vision.*, OpenCLIP's tower
    weight_offsets.pt    the generators of the offsets, attn1.wo_q.linear1.weight ...
    unet.pt              after tuning, instead of weight_offsets.pt: the whole UNet and its generators
    text_encoder.pt      after tuning, if it was trained
    domain.png           after tuning, the picture of the subject

This module is in sdjax.formats because it also reads towers, and formats/adapters does not import formats/models.
Our own reader reads the pickles.  The base model and tower that config.json names are never opened: model= gives the
base model, and vision= the tower if encoder.pt lacks one.
Source: e4t/utils.py and tuning_e4t.py of mkshing/e4t-diffusion at commit a1d2593.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sdjax import trees
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.e4t_attached import acting
from sdjax.formats.adapters.format import Format
from sdjax.formats.models import open_clip, single_file
from sdjax.formats.storage import files, parameters
from sdjax.images import reading
from sdjax.methods import offsets
from sdjax.methods.adapter import Adapter
from sdjax.methods.e4t import E4T
from sdjax.methods.heads.tokens import Tokens
from sdjax.methods.method import about
from sdjax.models.clip import ImageConfig, ImageEncoder
from sdjax.runtime.guard import named
from sdjax.settings import SettingError
from sdjax.stable_diffusion import TOKENS, StableDiffusion, to_pixels
from sdjax.trees import Tree

ENCODER, OFFSETS, UNET, TEXT, PICTURE = (
    "encoder.pt", "weight_offsets.pt", "unet.pt", "text_encoder.pt", "domain.png",
)  # fmt: skip
TOWER, GENERATOR, FIRST = "clip_vision.", ".wo_", "linear.weight"  # FIRST: in the encoder's first version
TABLE = "embeddings.token_embedding.weight"
TUNED = ("unet", "text_encoder")
VISION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # source of the public encoder's tower
SAID = {"word": "placeholder_token", "domain": "domain_class_token", "scale": "domain_embed_scale"}


class E4TPort(Format):
    """A head of tokens, its tower and offsets; after tuning also the trained networks."""

    name, called, suffixes, listed = "e4t-port", "e4t", (), "E4T hashes"
    hub = ("config.json", ENCODER, OFFSETS, UNET, TEXT, PICTURE)

    def matches(self, file: File) -> bool:
        """Returns whether a folder has an encoder.pt and offsets."""
        return (file.path / ENCODER).is_file() and any((file.path / name).is_file() for name in (OFFSETS, UNET))

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns {"head", "offsets"[, "image_encoder"][, "unet"][, "text_encoder"][, "concept"]}, weights float32."""
        folder = file.path
        told, vision = _settings(folder / "config.json")
        with named(folder / "config.json"):
            method = E4T(**told)
        own, config = _encoder(folder / ENCODER, sd, vision)
        own |= _unet(folder, sd)
        if (folder / TEXT).is_file():
            own["text_encoder"] = _text_encoder(folder / TEXT, sd)
        if (folder / PICTURE).is_file():
            own["concept"] = jnp.asarray(to_pixels(reading.picture(folder / PICTURE)))
        return Adapter(trees=own, about={**about(method), "file": str(folder), "config": config})

    def acts(self, adapter: Adapter, sd: StableDiffusion) -> Adapter:
        """Returns the encoder with its word, and edits for all weights that offsets and tuning changed."""
        seeing = self.brings(adapter, sd)
        tower = seeing.networks["image_encoder"], seeing.parts["image_encoder"]
        tuned = {part: adapter.trees[part] for part in TUNED if part in adapter.trees}
        return acting(sd, adapter, tuned, tower)

    def brings(self, adapter: Adapter, sd: StableDiffusion) -> StableDiffusion:
        """Returns sd with the file's tower and, after tuning, its UNet and text encoder."""
        own = adapter.trees
        if "image_encoder" in own:
            network = ImageEncoder(ImageConfig.from_json(adapter.about["config"]))
            sd = sd.with_networks(image_encoder=network).with_parts(image_encoder=own["image_encoder"])
        return sd.with_parts(**{part: own[part] for part in TUNED if part in own})

    def start(
        self, adapter: Adapter, method: Any, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the file's head and offsets; the head replaces the method's.

        Raises SettingError for a domain, features or scale other than the file's.
        """
        settings = adapter.about["settings"]
        for name in ("domain", "features", "scale"):
            if settings[name] != getattr(method, name):
                wanted = f"{settings[name]!r}, with which {adapter.about['file']} was trained"
                raise SettingError(name, getattr(method, name), wanted)
        unet = parameters.template(frozen.networks["unet"])
        own = {"head": adapter.trees["head"], "offsets": offsets.by_shape(unet, adapter.trees["offsets"])}
        return {**trained, **own}, Tokens().prepared(frozen)


def _settings(path: Path) -> tuple[dict[str, Any], str]:
    """Returns (E4T's settings, the tower's name) from config.json; after tuning, the settings of pre-training."""
    found = files.read_json(path)
    found = found.get("pretrained_args", found)
    kinds = {**dict.fromkeys(SAID.values(), str), SAID["scale"]: float, "clip_model_name_or_path": str}
    if type(found) is not dict:
        raise ValueError(f"{path}: pretrained_args={found!r}: expected an object of settings")
    for name, kind in kinds.items():
        value = found.get(name)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{path}: {name}={value!r}: expected a {'number' if kind is float else 'text'}")
    told = {ours: kinds[theirs](found[theirs]) for ours, theirs in SAID.items()}
    return told, found["clip_model_name_or_path"]


def _encoder(path: Path, sd: StableDiffusion, vision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns ({"head"[, "image_encoder"]}, the tower's config) of encoder.pt."""
    weights, own = _opened(path), {}
    if FIRST in weights.names:
        raise ValueError(f"{path}: holds {FIRST}: an encoder of the first version, whose head is not known here")
    if any(name.startswith(TOWER) for name in weights.names):
        config, view = open_clip.tower(weights, TOWER, vision)
        network = ImageEncoder(config)
        with named(path):
            own["image_encoder"] = parameters.read(view, network, "image_encoder", "float32", (open_clip.PROJECTION,))
        sd = sd.with_networks(image_encoder=network)
    elif "image_encoder" not in sd.parts:
        raise ValueError(f"{path}: holds no {TOWER}*, the vision tower; give it with vision={VISION}")
    head = _chosen(weights, lambda name: None if name.startswith(TOWER) else name)
    like = Tokens().shapes(sd)
    own["head"] = parameters.read_tree(head, like, "float32", sizes="the model and its vision tower")
    return own, sd.networks["image_encoder"].config.to_json()


def _unet(folder: Path, sd: StableDiffusion) -> dict[str, Any]:
    """Returns {"offsets": generators by weight[, "unet"]} from unet.pt if it exists, else from weight_offsets.pt."""
    tuned = (folder / UNET).is_file()
    weights, unet = _opened(folder / (UNET if tuned else OFFSETS)), parameters.template(sd.networks["unet"])
    like = jax.eval_shape(lambda stacked: offsets.by_name(unet, stacked), offsets.create(unet))
    theirs = {_generator_name(name): name for name in parameters.file_names(like)}
    generators = _chosen(weights, lambda name: theirs.get(name, name) if GENERATOR in name or not tuned else None)
    own: dict[str, Any] = {"offsets": parameters.read_tree(generators, like, "float32", sizes="the model")}
    if tuned:
        rest = _chosen(weights, lambda name: None if GENERATOR in name else name)
        own["unet"] = parameters.read_tree(rest, unet, "float32", "unet", sizes="the model")
    return own


def _generator_name(ours: str) -> str:
    """Returns the port's name for a generator's weight: "... attn1.wo_q.v" for "... attn1.to_q.kernel.v"."""
    module, _, rest = ours.rpartition(".kernel.")
    place, _, target = module.rpartition(".to_")
    return f"{place}{GENERATOR}{target}.{rest}"


def _text_encoder(path: Path, sd: StableDiffusion) -> Tree:
    """Returns the text encoder with as many token rows as the model's; the port's extra row of the word is cut off."""
    weights, rows = _opened(path), len(sd.table("text_encoder"))
    tables = [weights.shape(name) for name in weights.names if name.endswith(TABLE)]
    there = tables[0][0] if len(tables) == 1 and tables[0] else 0
    if not rows <= there <= rows + 1:
        raise ValueError(f"{path}: {TABLE} has {there} rows; expected the {rows} of the model, or one more")
    network = sd.networks["text_encoder"]
    network = network.clone(config=dataclasses.replace(network.config, vocab_size=there))
    with named(path):
        read = parameters.read(weights, network, "text_encoder", "float32")
    return trees.edit(read, f"^{TOKENS}$", lambda name, weight: weight[:rows])


def _opened(path: Path) -> files.Arrays:
    return files.Arrays(path, files.arrays(path))


def _chosen(weights: files.Arrays, rename: Callable[[str], str | None]) -> single_file.View:
    """Returns the weights under the names that `rename` returns; leaves out those with None."""
    places = {new: (name, None) for name in weights.names if (new := rename(name)) is not None}
    return single_file.View(weights, places)
