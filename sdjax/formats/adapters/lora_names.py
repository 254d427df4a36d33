"""Names of layers in LoRA files: every spelling that is read, generated from the model's own names and never parsed."""

import functools

from sdjax import trees
from sdjax.formats.storage import ldm_names, parameters
from sdjax.formats.storage.parameters import Network
from sdjax.models.clip import TextEncoder
from sdjax.models.unet import UNet


@functools.lru_cache(maxsize=4)
def spellings(unet: UNet, text_encoder: TextEncoder) -> dict[str, tuple[str, str]]:
    """Returns {every spelling of a module's name: (part, module)} of the layers with a kernel."""
    found = {}
    original = ldm_names.unet_modules(unet.config)
    for module in modules(unet):
        spelled = _unet_spellings(module, ldm_names.rename(module, original))
        found |= dict.fromkeys(spelled, ("unet", module))
    for module in modules(text_encoder):
        found |= dict.fromkeys(_text_spellings(module), ("text_encoder", module))
    return found


def modules(network: Network) -> list[str]:
    """Returns the dotted names of the layers that have a kernel."""
    leaves = (name.rpartition(".") for name in trees.names(parameters.template(network)))
    return [module for module, _, leaf in leaves if leaf == "kernel"]


def _unet_spellings(module, original):
    """Yields all names of a module; original: its name in the original code, which sd-scripts and ComfyUI write too."""
    yield from (module, f"unet.{module}", f"base_model.model.{module}", f"diffusion_model.{original}")
    yield from (f"lora_unet_{name.replace('.', '_')}" for name in (module, original))
    yield f"lycoris_{module.replace('.', '_')}"
    attention, _, projection = module.removesuffix(".0").rpartition(".")
    if projection in ("to_q", "to_k", "to_v", "to_out"):  # with and without the part's name
        for part in ("", "unet."):
            processor = f"{part}{attention}.processor.{projection}"
            yield from (f"{processor}_lora", processor)  # diffusers before 0.20, Custom Diffusion


def _text_spellings(module):
    for name in (module, module.removeprefix("text_model.")):
        flat = name.replace(".", "_")
        yield from (name, f"text_encoder.{name}", f"base_model.model.{name}", f"lora_te_{flat}", f"lora_te1_{flat}")
        yield from (f"text_encoders.clip_l.transformer.{name}", f"lycoris_{flat}")
        attention, _, projection = name.removesuffix("_proj").rpartition(".")
        if name.endswith("_proj"):  # diffusers before 0.20
            yield f"text_encoder.{attention}.to_{projection}_lora"
