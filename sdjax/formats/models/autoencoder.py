"""Replaces a model's autoencoder, which A1111 calls VAE.

sd = put(sd, "vae-ft-mse-840000-ema-pruned.safetensors")        # or a .ckpt or .pt, a diffusers folder, a hub id
"""

import os
import pathlib

import jax.numpy as jnp
from jax.typing import DTypeLike

from sdjax.formats.models import infer_config, single_file
from sdjax.formats.models.folder import read_config
from sdjax.formats.storage import checkpoints, files, parameters
from sdjax.models.vae import AutoencoderKL, VaeConfig
from sdjax.runtime.guard import named
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
STEM = "diffusion_pytorch_model"  # diffusers' file of weights
PATTERNS = [["config.json", "vae/config.json", f"{STEM}.safetensors", f"vae/{STEM}.safetensors"]]
PATTERNS += [[f"{STEM}.bin", f"vae/{STEM}.bin"]]


def put(sd: StableDiffusion, source: str | pathlib.Path, dtype: DTypeLike | None = "float32") -> StableDiffusion:
    """Returns sd with another autoencoder, from a file, a diffusers folder (or its vae/) or a hub id.

    Files have the original names, with or without the prefix first_stage_model.; a whole checkpoint also works.
    Raises SettingError in one line for a damaged source, or latents of another size than the model's.
    """
    try:
        with named(source):
            return _put(sd, source, dtype)
    except ValueError as error:
        raise SettingError("vae", str(source), "an autoencoder that fits the model", str(error)) from None


def _put(sd: StableDiffusion, source: str | pathlib.Path, dtype: DTypeLike | None) -> StableDiffusion:
    weights, config = _file(source, sd) if os.path.isfile(source) else _folder(locate(source))
    old, factor = sd.networks["vae"].config, 2 ** (len(config.block_out_channels) - 1)
    if (config.latent_channels, factor) != (old.latent_channels, 2 ** (len(old.block_out_channels) - 1)):
        raise ValueError(
            f"{config.latent_channels} latent channels, sides divided by {factor}; expected the model's"
            f" {old.latent_channels} and {2 ** (len(old.block_out_channels) - 1)}"
        )
    network = AutoencoderKL(config, jnp.dtype(dtype or "float32"))
    weights = single_file.vae_view(weights, network) if os.path.isfile(source) else weights
    params = parameters.read(weights, network, "vae", dtype)
    return sd.with_networks(vae=network).with_parts(vae=params)


def locate(source: str | pathlib.Path) -> pathlib.Path:
    """Returns the local folder of an autoencoder: the source itself, or its vae/."""
    folder = files.locate(source, PATTERNS, lambda folder: any(folder.rglob(f"{STEM}.safetensors")))
    return folder / "vae" if (folder / "vae").is_dir() else folder


def _folder(folder: pathlib.Path) -> tuple[files.Stored, VaeConfig]:
    return files.open_weights(folder, STEM), read_config(folder / "config.json", VaeConfig.from_json)


def _file(path: str | pathlib.Path, sd: StableDiffusion) -> tuple[files.Stored, VaeConfig]:
    """Returns (weights under the names of a whole checkpoint, VaeConfig) of a single file."""
    weights = checkpoints.opened(pathlib.Path(path))[0]
    prefix = single_file.VAE if any(name.startswith(single_file.VAE) for name in weights.names) else ""
    places = {name.removeprefix(prefix): name for name in weights.names if name.startswith(prefix)}
    places = {name: place for name, place in places.items() if name.startswith(MODULES)}
    if "decoder.conv_in.weight" not in places or "encoder.mid.block_1.conv1.weight" not in places:
        raise ValueError("no autoencoder with the original names; expected such a file, or a diffusers folder")
    shapes = {name: weights.shape(place) for name, place in places.items()}
    view = single_file.View(weights, {single_file.VAE + name: (place, None) for name, place in places.items()})
    return view, infer_config.vae_config(shapes, sd.networks["unet"].config)
