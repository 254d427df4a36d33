"""A ControlNet of a kind of pictures: edges here, found in the training pictures as they are shown.

    python train/run.py configs/controlnet.py data.path=photos
    python train/run.py configs/controlnet.py data.path=photos data.condition=files     # NAME.condition.png beside each

Other conditions: scribble, softedge, lines, depth (made of the pictures); openpose, segmentation, mask (files).  An
inpainting model learns one too.  Rates and dropped prompts: the original's; it converges suddenly, after 3,000 to 7,000
steps of batches of 4 in full size, and larger batches help.

export/ is the folder that diffusers' ControlNetModel reads; python -m sdjax.convert FOLDER NAME.safetensors makes of it
a file for A1111 and ComfyUI.
"""

from sdjax.data.batches import Data
from sdjax.methods.controlnet import ControlNet
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=ControlNet(),
        data=Data(condition="canny", dropout=0.5, batch=4),
        optim=Optim(lr=1e-5),
        steps=10000,
    )
