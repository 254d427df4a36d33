"""Encodes pictures as the bytes of a file.

png(picture)                                    # b"\\x89PNG..."
"""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def png(picture: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"] | Image.Image) -> bytes:
    """Returns the PNG of a picture: colours [H W 3], a mask [H W], or a Pillow image."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(written := io.BytesIO(), "PNG")
    return written.getvalue()
