"""An inpainting model of a plain one: its UNet also reads a mask and the picture around it.

    python train/run.py configs/inpainting.py data.path=photos
    python sample/inpaint.py --model outputs/inpainting/export --image photo.png --mask mask.png --prompt "a face"

The new channels start at zero.  Holes are drawn anew for every picture at every step: rectangles, ellipses, strokes of
a brush, all but a part of the picture (outpainting), and for a quarter all of it.  A tenth of the prompts is empty; the
rate is a tenth of the original's at a batch of 2,048, without which small batches forget what the model knew.

export/ is a folder that diffusers' StableDiffusionInpaintPipeline loads; python -m sdjax.convert makes one file of it.
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
