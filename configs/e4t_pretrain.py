"""Trains E4T's encoder and weight offsets for a domain, from a folder of many pictures.

    make train-encoder MODEL=models/sd15 DATA=photos/faces
    make train-encoder MODEL=models/sd15 DATA=photos/cats ARGS="method.domain=cat data.templates=object"

The settings follow the unofficial code (rate 1.6e-5 at batch 16, 30,000 steps for faces); the paper publishes none.
The image encoder is a hub id or a folder; vision='' uses the model's own.
"""

from sdjax.data.batches import Data
from sdjax.methods.e4t import E4T
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        vision="openai/clip-vit-large-patch14",
        method=E4T(word="*s", domain="face"),
        data=Data(templates="face", concept="same", batch=16),
        optim=Optim(lr=1.6e-5, clip=None),
        steps=30000,
        compute="bfloat16",
        frozen="bfloat16",
        remat=True,
        checkpoint=500,
    )
