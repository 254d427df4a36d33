"""Transparency of pictures, and masks from picture files.

    of(opened(Image.open("mask.png")))      # "L", 255 where something is to be painted or learned

People draw a mask in white on black, or in any colour on a transparent background.  So the mask is the alpha channel of
a picture with transparent pixels, and otherwise its brightness.
"""

import numpy as np
from PIL import Image, ImageChops

# Pillow scales grey of 2 and 4 bits to 0 ... 255, but not the file's transparent colour.
SPREAD = {"L;2": 85, "L;4": 17}


def opened(image: Image.Image) -> Image.Image:
    """Returns a picture of any mode as "RGB", or as "RGBA" if some pixel is not opaque.

    image: the result of Image.open, with pixels not loaded yet; this function loads them.  16-bit samples keep their
    upper 8 bits.
    """
    key = _clear(image)  # depends on the file's pixel format, which Pillow drops when it loads
    image.load()
    if image.has_transparency_data and key is None:
        whole = image.convert("RGBA")
        return whole.convert("RGB") if whole.getchannel("A").getextrema() == (255, 255) else whole
    picture = (_upper_bits(image) if image.mode.startswith("I") else image).convert("RGB")
    if key is not None:
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
        clear = np.atleast_3d(pixels == np.asarray(key)).all(-1)
        if clear.any():
            picture.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return picture


def of(picture: Image.Image) -> Image.Image:
    """Returns the mask of an "RGB" or "RGBA" picture as an "L" image: its alpha, or else its brightest channel."""
    *colours, last = picture.split()
    return last if picture.mode == "RGBA" else ImageChops.lighter(ImageChops.lighter(*colours), last)


def _upper_bits(image):
    """Returns a 16-bit grey picture as 8-bit grey."""
    return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))


def _clear(image):
    """Returns the transparent colour of a grey or RGB picture (PNG's tRNS), in the values of loaded pixels, or None.

    Pillow keeps the upper 8 bits of 16-bit RGB, so all colours with the same upper bits are transparent.
    """
    key = image.info.get("transparency")
    if key is None or image.mode == "P" or not image.tile:
        return None
    stored = image.tile[0].args
    if stored == "RGB;16B":
        return tuple(part >> 8 for part in key)
    return key * SPREAD[stored] if stored in SPREAD else key
