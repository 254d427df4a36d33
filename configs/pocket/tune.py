"""Tunes E4T on one image with the embedded model in 15 steps: head, offsets and the whole UNet.

    make tune IMAGE=photo.png

The batch is 16 copies of the image, each with its own time, noise and template.  Muon learns more of a person in a
few steps than AdamW; the falling rate preserves what prompts name.  Head and offsets learn slowly: at the UNet's
rate, 15 steps destroy what they know, and hair changes its colour.  min_snr: as in e4t.py.  Fewer steps follow
prompts better, glasses above all, and show less of the person (figures in docs/log/2026-11.md).
"""

from sdjax.data.batches import Data
from sdjax.methods.chain import Chain
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        model="pocket",
        init="pocket",
        method=Chain((E4T(word="*s", domain="face", penalty=1e-4), Full(("unet",)))),
        data=Data(templates="face", batch=16),
        optim=Optim(
            kind="muon",
            lr=2.4e-3,
            schedule="linear",
            end=0.3,
            weight_decay=0.0,
            rates=(("head", 0.05), ("offsets", 0.02), ("(bias|scale)$", 0.3)),
        ),
        steps=15,
        out="outputs/tune/{picture}",
        min_snr=0.5,
        checkpoint=0,
        log=1,
    )
