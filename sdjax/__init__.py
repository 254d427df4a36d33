"""Stable Diffusion personalization in JAX.

    sd = sdjax.load("pocket")
    images = sdjax.text2img(sd, ["a photo of a face on the beach"], seeds=[0])   # uint8 [B H W 3]
    sdjax.save(sd, "folder")

Names are looked up when first used, so importing the package imports nothing else.
"""

import importlib

__version__ = "0.1.0"

PUBLIC = {
    "StableDiffusion": "sdjax.stable_diffusion",
    "attach": "sdjax.formats.adapters.attach",
    "detach": "sdjax.formats.adapters.attach",
    "hires": "sdjax.sampling.upscaling",
    "img2img": "sdjax.sampling.generate",
    "inpaint": "sdjax.sampling.inpainting",
    "interpolate": "sdjax.sampling.generate",
    "load": "sdjax.formats.pipeline",
    "load_control": "sdjax.formats.models.controlnet",
    "save": "sdjax.formats.pipeline",
    "save_control": "sdjax.formats.models.controlnet",
    "spread": "sdjax.runtime.replicas",
    "super_resolve": "sdjax.sampling.upscaling",
    "text2img": "sdjax.sampling.generate",
    "upscale": "sdjax.sampling.upscaling",
}

__all__ = ["__version__", *PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__():
    return sorted([*globals(), *PUBLIC])
