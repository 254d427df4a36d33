"""Scribbles and sketches: few thick strokes, as a person draws them, for scribble ControlNets.

Source: the thresholded difference of two Gaussians of Winnemoeller 2011, "XDoG: Advanced Image Stylization with
eXtended Difference-of-Gaussians"; sd-webui-controlnet's scribble_xdog uses sigmas 0.5 and 5 and the threshold 32.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from sdjax import settings
from sdjax.conditions.condition import Condition

SIGMAS = 0.5, 5.0  # in pixels of a picture of 512


@dataclass(frozen=True)
class Scribble(Condition):
    """White strokes on black.

    threshold: twice the difference in darkness between a stroke and its surroundings, 0 to 510.
    """

    threshold: int = 32
    name = "scribble"
    kind = "a sketch"

    def __post_init__(self):
        settings.check(self, threshold=settings.FROM_0)

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns 255 where a channel is darker than its surroundings, 0 elsewhere."""
        from scipy import ndimage

        scale = min(picture.shape[:2]) / 512
        fine, coarse = (
            ndimage.gaussian_filter(picture.astype(np.float32), (sigma * scale, sigma * scale, 0), mode="mirror")
            for sigma in SIGMAS
        )
        darker = np.clip((coarse - fine).max(-1), 0, 255)
        strokes = np.where(2 * darker > self.threshold, 255, 0).astype(np.uint8)
        return np.repeat(strokes[..., None], 3, axis=-1)
