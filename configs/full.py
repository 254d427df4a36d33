"""Fine-tunes the UNet on a folder of pictures with captions.

python train/run.py configs/full.py data.path=photos
python train/run.py configs/full.py data.path=photos 'method.parts=("unet", "text_encoder")'
"""

from sdjax.data.batches import Data
from sdjax.methods.full import Full
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Full(("unet",)),
        data=Data(batch=4, dropout=0.1, buckets=3),
        optim=Optim(lr=1e-5, warmup=100),
        steps=1000,
        min_snr=5.0,
    )
