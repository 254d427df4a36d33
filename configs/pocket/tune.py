"""15 steps of E4T on one image with the embedded model: the encoder's head, the offsets and the whole UNet.

    make tune IMAGE=photo.png

The batch is 16 copies of the image with times, noise and templates of their own.
"""

from sdjax.data.batches import Data
from sdjax.methods.chain import Chain
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.training.loop import Train
from sdjax.training.optim import Optim


def config():
    """Returns the run's settings."""
    return Train(
        model="pocket",
        init="pocket",
        method=Chain((E4T(word="*s", domain="face", penalty=1e-4), Full(("unet",)))),
        data=Data(word="*s", templates="face", batch=16),
        optim=Optim(lr=3e-4, weight_decay=0.0),
        steps=15,
        checkpoint=0,
        log=1,
    )
