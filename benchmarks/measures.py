"""Measures of the pictures that compare.py makes: the judges of Pocketland, and a CLIP.

looks(judges.load(), subject, made, options)        # of drawn people
by_clip(judge.load("pocket"), subject, made, options)
"""

import argparse

import embedded
import judges
import numpy as np
import pocket
from PIL import Image
from subjects import Subject

from sdjax.data import pocketland
from sdjax.images import reading
from sdjax.methods import likeness
from sdjax.stable_diffusion import StableDiffusion

KINDS = ("context", "style", "accessory")


def looks(networks, subject: Subject, made: np.ndarray, options: argparse.Namespace) -> dict[str, float]:
    """Returns figures of a drawn person's pictures: the similarities s, s0 and s1, and the share of prompts' words.

    s: to the person's first photo.  s0, s1: the same for drawings of somebody else and of the person.
    """
    places = [*pocket.PLACES[: options.prompts]] * options.seeds
    scenes = [pocketland.scene(pocket.SCENES + 20_000 + 8 * subject.number + k, *p) for k, p in enumerate(places)]
    other = pocketland.identity(pocket.SPLITS[options.split] + 60_000 + subject.number)
    own = judges.identity(networks, np.asarray(Image.open(subject.files[0]))[None])[0]
    s, s1, s0 = (
        float((judges.identity(networks, np.stack(some)) @ own).mean())
        for some in (made, *([embedded.draw(p, scene) for scene in scenes] for p in (subject.who, other)))
    )
    seen = judges.classify(networks, made)
    right = [seen[kind][i] == word for i, place in enumerate(places) for kind, word in zip(KINDS, place, strict=True)]
    return {"s": s, "s0": s0, "s1": s1, "prompts": float(np.mean(right))}


def by_clip(clip: StableDiffusion | None, subject: Subject, made: np.ndarray, options) -> dict[str, float]:
    """Returns likeness.figures by a CLIP, {} without one; prompts name the subject subject.plain."""
    if clip is None:
        return {}
    own = likeness.images(clip, [reading.picture(path) for path in subject.files])
    return likeness.figures(clip, made, own, subject.texts(subject.plain, options.prompts) * options.seeds)
