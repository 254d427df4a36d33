"""The base model of a run.

sd = load(settings)                       # settings.model with the run's autoencoder, tokenizer and encoders
mark = digest(settings, sd)               # the same only for the same model
"""

from typing import Any

from sdjax import trees
from sdjax.formats import pipeline
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

LOADED = ("vae", "prediction_type", "tokenizer")  # settings with the same names in pipeline.load


def load(settings: Any, perceptual: bool = True) -> StableDiffusion:
    """Returns the model of a run's Train settings, in float32.

    perceptual: whether to read the weights of the perceptual loss too.
    Raises ValueError in one line for a missing model, and settings that do not fit it.
    """
    how = {name: getattr(settings, name) or None for name in (*LOADED, "vision")}
    lpips = (settings.perceptual or None) if perceptual else None
    try:
        return pipeline.load(settings.model, **how, perceptual=lpips, ema=settings.model_ema)
    except SettingError as error:
        if error.name != "ema":
            raise
        raise SettingError("model_ema", error.value, error.expected, error.why) from None


def digest(settings: Any, sd: StableDiffusion) -> str:
    """Returns the digest of a loaded model.

    For a new model, its name replaces the weights: their last bits depend on the device.
    """
    if settings.model.startswith("new:"):
        vision = sd.parts["image_encoder"] if settings.vision else None
        told = (settings.model, vision, sd.reference, *([sd.parts["vae"]] if settings.vae else []))
    else:
        told = sd
    more = {}
    if settings.prediction_type:
        more["prediction_type"] = sd.schedule.prediction_type
    if settings.tokenizer:
        more["tokenizer"] = {encoder: tokenizer.digest for encoder, tokenizer in sd.tokenizers.items()}
    return trees.digest((trees.digest(told), more)) if more else trees.digest(told)
