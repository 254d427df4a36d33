"""Turns a plain model into an inpainting model, whose UNet also reads a mask and the masked picture.

    python train/run.py configs/inpainting.py data.path=photos
    python sample/inpaint.py --model outputs/inpainting/export --image photo.png --mask mask.png --prompt "a face"

The new input channels start at zero.  Each step draws new masks: rectangles, ellipses, brush strokes, everything
outside a region (outpainting), and for a quarter of the pictures everything.  A tenth of the prompts are empty.
The learning rate is a tenth of the original's, which used a batch of 2,048; at the full rate small batches forget
the base model.

export/ is a folder for diffusers' StableDiffusionInpaintPipeline; python -m sdjax.convert makes one file from it.
"""

from sdjax.data.batches import Data
from sdjax.methods.full import Full
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Full(("unet",)),
        task="inpainting",
        data=Data(batch=4, dropout=0.1),
        optim=Optim(lr=7.5e-6),
        steps=10000,
    )
