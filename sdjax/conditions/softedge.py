"""Soft edges: the slope of brightness in shades of grey, for softedge (HED) ControlNets.

Source: the gradient's magnitude in a Gaussian-smoothed picture (Marr and Hildreth 1980; Canny 1986); the scale is our
choice.  HED and PiDiNet are networks; this condition needs none.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from sdjax import settings
from sdjax.conditions.condition import Condition

TOP = 99  # percentile of slopes that becomes white
LEAST = 8.0  # least slope, of 255 per pixel, that may become white, so that noise in an even picture does not


@dataclass(frozen=True)
class SoftEdge(Condition):
    """Grey edges on black.  sigma: smoothing in pixels at a shorter side of 512, scaled with the shorter side."""

    sigma: float = 2.0
    name = "softedge"
    kind = "soft edges"

    def __post_init__(self):
        settings.check(self, sigma=settings.ABOVE_0)

    def make(self, picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the slope of a picture's steepest channel, scaled so that the 99th percentile is white."""
        from scipy import ndimage

        sigma = self.sigma * min(picture.shape[:2]) / 512
        slopes = [
            ndimage.gaussian_gradient_magnitude(picture[..., i].astype(np.float32), sigma, mode="nearest")
            for i in range(3)
        ]
        slope = np.max(slopes, axis=0)
        white = max(np.percentile(slope, TOP), LEAST)
        grey = np.clip(255 * slope / white, 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
