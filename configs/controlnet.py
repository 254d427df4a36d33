"""Trains a ControlNet on pictures and a condition computed from them, edges by default.

    python train/run.py configs/controlnet.py data.path=photos
    python train/run.py configs/controlnet.py data.path=photos data.condition=files     # NAME.condition.png beside each

Other conditions: scribble, softedge, lines, depth (computed); openpose, segmentation, mask (files).  An inpainting
model works as the base too.  Learning rate and prompt dropout are the original's.  At full size with batches of 4,
the network starts to follow its pictures suddenly, after 3,000 to 7,000 steps; larger batches help.

export/ is a folder for diffusers' ControlNetModel; with save_model_as=single-file, one file for A1111 and ComfyUI.
"""

from sdjax.data.batches import Data
from sdjax.methods.controlnet import ControlNet
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=ControlNet(),
        data=Data(condition="canny", dropout=0.5, batch=4, buckets=3),
        optim=Optim(lr=1e-5),
        steps=10000,
    )
