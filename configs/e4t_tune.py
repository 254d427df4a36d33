"""Tunes E4T on one image in 5 to 15 steps: the encoder's head, the offsets and the whole UNet.

    make tune MODEL=outputs/e4t_pretrain/export IMAGE=photo.png
    make tune MODEL=outputs/e4t_pretrain/export IMAGE=cat.png ARGS="method.parts.0.domain=cat data.templates=object"
    make tune MODEL=CompVis/stable-diffusion-v1-4 INIT=mkshing/e4t-diffusion-ffhq-celebahq-v1 IMAGE=face.jpg

The model is the export of configs/e4t_pretrain.py, or any model with the folder of the unofficial E4T as init=
(docs/formats.md).  The batch is 16 copies of the image, each with its own time, noise and template.  The rate is
the unofficial code's, 1e-6 per copy.
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
        model="outputs/e4t_pretrain/export",
        init="outputs/e4t_pretrain/export",
        method=Chain((E4T(word="*s", domain="face"), Full(("unet",)))),
        data=Data(templates="face", batch=16),
        optim=Optim(lr=1.6e-5, weight_decay=0.0),
        steps=15,
        out="outputs/tune/{picture}",
        compute="bfloat16",
        frozen="bfloat16",
        remat=True,
        checkpoint=0,
        log=1,
    )
