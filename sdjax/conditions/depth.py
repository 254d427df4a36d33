"""Depth maps (near is white) from a model of transformers, which needs torch, in a folder or on the hub.

lllyasviel's depth ControlNets were trained on MiDaS' DPT, which estimates inverse depth.  As in the ControlNet
repository's annotator, its smallest value becomes 0 and its largest 255.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdjax.conditions.condition import Condition

USUAL = "Intel/dpt-hybrid-midas"


@dataclass(frozen=True)
class Depth(Condition):
    """A grey map of inverse depth.  model: folder or hub id for transformers' AutoModelForDepthEstimation."""

    model: str = USUAL
    name = "depth"
    kind = "distances"
    private = ("model",)

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the inverse depth of a picture.  Raises ValueError without transformers, torch or such a model."""
        estimated = np.asarray(_estimator(self.model)(Image.fromarray(picture))["predicted_depth"], np.float32)
        estimated = np.squeeze(estimated)
        low, high = float(estimated.min()), float(estimated.max())
        grey = ((estimated - low) / max(high - low, 1e-6) * 255).round().astype(np.uint8)
        height, width = picture.shape[:2]
        if grey.shape != (height, width):
            grey = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))
        return np.repeat(grey[..., None], 3, axis=-1)


@functools.lru_cache(1)
def _estimator(model: str) -> Any:
    """Returns transformers' pipeline of a model, the last one kept."""
    try:
        return importlib.import_module("transformers").pipeline("depth-estimation", model=model)
    except ImportError:
        raise ValueError('condition "depth" needs transformers and torch: pip install -e ".[torch]"') from None
    except (OSError, ValueError, KeyError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f'condition "depth": model={model!r}: {why}') from None
