"""Stable Diffusion 1 and 2, their inpainting models and the x4 upscaler: one CLIP text encoder.

Source: Rombach et al. 2022 (arXiv 2112.10752); diffusers' folder layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdjax.families.family import Family, Part
from sdjax.models.clip import ImageConfig, ImageEncoder, TextConfig, TextEncoder
from sdjax.models.cond import UNetInputs
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import AutoencoderKL, VaeConfig
from sdjax.stable_diffusion import StableDiffusion

# Pipelines by the UNet's number of channels for c latent channels (noisy latents, then mask or image).
CHANNELS = {
    "StableDiffusionPipeline": lambda c: c,
    "StableDiffusionInstructPix2PixPipeline": lambda c: 2 * c,
    "StableDiffusionInpaintPipeline": lambda c: 2 * c + 1,
    "StableDiffusionUpscalePipeline": lambda c: c + 3,
}


@dataclass(frozen=True)
class Sd(Family):
    """One text encoder; its output is the UNet's context."""

    parts = {
        "unet": Part("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model", UNetConfig, UNet),
        "vae": Part("diffusers", "AutoencoderKL", "diffusion_pytorch_model", VaeConfig, AutoencoderKL),
        "text_encoder": Part("transformers", "CLIPTextModel", "model", TextConfig, TextEncoder),
        "image_encoder": Part("transformers", "CLIPVisionModelWithProjection", "model", ImageConfig, ImageEncoder),
    }
    required = ("unet", "vae", "text_encoder")
    tokenizers = {"text_encoder": "tokenizer"}
    pipelines = (*CHANNELS, "StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline")
    beside = {
        "requires_safety_checker": False,
        **dict.fromkeys(("safety_checker", "image_encoder", "feature_extractor"), (None, None)),
    }

    lora = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1")}
    rows = {"text_encoder": "clip_l"}

    def pipeline(self, sd: StableDiffusion) -> str:
        """Returns the pipeline for the UNet's number of channels."""
        entering, latent = sd.networks["unet"].config.in_channels, sd.networks["vae"].config.latent_channels
        fitting = [name for name, channels in CHANNELS.items() if channels(latent) == entering]
        if not fitting:
            raise ValueError(
                f"unet in_channels={entering}: no pipeline of diffusers takes that with {latent} latent channels"
            )
        return fitting[0]

    def inputs(self, encoded: Mapping[str, Mapping[str, Any]]) -> UNetInputs:
        """Returns the text encoder's output as the context."""
        return UNetInputs(encoded["text_encoder"]["context"])
