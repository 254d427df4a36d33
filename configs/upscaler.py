"""Turns a plain model into an upscaler, or trains the x4 upscaler; the UNet also reads the small picture.

    python train/run.py configs/upscaler.py data.path=photos
    python sample/upscale.py --model outputs/upscaler/export --image small.png --prompt "a face"

The scale is the autoencoder's factor: 8 with Stable Diffusion 1's, 4 with the x4 upscaler's.  The small picture is
averaged over tiles, with noise of 0 to 349 of 1,000 steps of its own schedule; the UNet reads that noise level.
For model=stabilityai/stable-diffusion-x4-upscaler set data.size=512 and data.crop=random, like the original
training.

export/ is a folder for diffusers' StableDiffusionUpscalePipeline.
"""

from sdjax.data.batches import Data
from sdjax.methods.full import Full
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Full(("unet",)),
        task="upscaling",
        data=Data(batch=4, dropout=0.1),
        optim=Optim(lr=1e-5),
        steps=10000,
    )
