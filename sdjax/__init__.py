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
    "attach": "sdjax.convert.adapters",
    "detach": "sdjax.convert.adapters",
    "hires": "sdjax.upscaling",
    "img2img": "sdjax.generate",
    "inpaint": "sdjax.inpainting",
    "interpolate": "sdjax.generate",
    "load": "sdjax.convert.pipeline",
    "load_control": "sdjax.convert.controlnet",
    "save": "sdjax.convert.pipeline",
    "save_control": "sdjax.convert.controlnet",
    "spread": "sdjax.devices",
    "super_resolve": "sdjax.upscaling",
    "text2img": "sdjax.generate",
    "upscale": "sdjax.upscaling",
}

__all__ = ["__version__", *PUBLIC]


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__():
    return sorted([*globals(), *PUBLIC])
