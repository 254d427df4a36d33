"""LDM-SR: super-resolution by latent diffusion, without text.

Source: Rombach et al. 2022 (arXiv 2112.10752), section 4.4; diffusers' folder layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdjax.families.family import Family, Part
from sdjax.models.cond import UNetInputs
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import AutoencoderKL, VaeConfig


@dataclass(frozen=True)
class LdmSr(Family):
    """A UNet that reads a latent and a small picture, and an autoencoder with a codebook."""

    parts = {
        "unet": Part("diffusers", "UNet2DModel", "diffusion_pytorch_model", UNetConfig, UNet),
        "vae": Part("diffusers", "VQModel", "diffusion_pytorch_model", VaeConfig, AutoencoderKL, place="vqvae"),
    }
    required = ("unet", "vae")
    pipelines = ("LDMSuperResolutionPipeline",)
    lora = {"unet": ("lora_unet",)}
    scheduler = {"steps_offset": 0}  # only Stable Diffusion's pipelines have an offset of 1

    def inputs(self, encoded: Mapping[str, Mapping[str, Any]]) -> UNetInputs:
        """Returns empty inputs: there is no text."""
        return UNetInputs()
