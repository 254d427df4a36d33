"""CLIP-I and CLIP-T: how alike pictures are to a subject's own, and to their prompts.

    own = images(judge, photos)                           # uint8 pictures [H W 3]
    figures(judge, made, own, prompts)                    # {"clip-i": 0.71, "clip-t": 0.25}

judge: a model with an image encoder and, for CLIP-T, a text encoder with reference.clip, see formats/judge.py.
Source: Ruiz et al. 2022, "DreamBooth" (arXiv 2208.12242), section 4.1.
"""

from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sdjax.methods.clip import ENCODER, embed_images, embed_texts
from sdjax.stable_diffusion import StableDiffusion, to_pixels

Pictures = Iterable[UInt8[np.ndarray, "_h _w 3"]]
AT_ONCE = 16  # pictures of a batch

_images = jax.jit(embed_images)
_texts = jax.jit(embed_texts)


def figures(
    judge: StableDiffusion, made: Pictures, own: Float[np.ndarray, "n P"], prompts: Sequence[str]
) -> dict[str, float]:
    """Returns {"clip-i", "clip-t"}, both mean cosines of embeddings, -1 to 1; without a text projection only the first.

    clip-i: between pictures and the subject's own, over all pairs.  clip-t: between each picture and its prompt.
    own: embeddings of the subject's pictures, see images.
    """
    seen = images(judge, made)
    found = {"clip-i": float((seen @ own.T).mean())}
    if judge.reference.clip is not None:
        found["clip-t"] = float((seen * texts(judge, prompts)).sum(-1).mean())
    return found


def images(judge: StableDiffusion, pictures: Pictures) -> Float[np.ndarray, "B P"]:
    """Returns unit embeddings [B P] of pictures uint8 [H W 3] of any sizes."""
    size = judge.networks["image_encoder"].config.image_size
    seen = np.stack([_seen(picture, size) for picture in pictures])
    parts = [seen[k : k + AT_ONCE] for k in range(0, len(seen), AT_ONCE)]
    return np.concatenate([np.asarray(_images(judge.bare, to_pixels(part))) for part in parts])


def texts(judge: StableDiffusion, prompts: Sequence[str]) -> Float[np.ndarray, "B P"]:
    """Returns unit embeddings [B P] of texts."""
    projection = judge.reference.clip["text_projection"]["kernel"]
    return np.asarray(_texts(judge, judge.tokenize(prompts)[ENCODER], projection))


def _seen(picture, size):
    """Returns a picture as CLIP's processor cuts it: the shorter side resized to `size`, the centre cropped.

    Source: transformers, CLIPImageProcessor: bicubic, rounded to 1/255, sides rounded down.
    """
    height, width = picture.shape[:2]
    short = min(height, width)
    if short != size:
        height, width = height * size // short, width * size // short
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return picture[top : top + size, left : left + size]
