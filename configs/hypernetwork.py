"""Trains a hypernetwork in A1111's format, from a folder of pictures with captions.

    python train/run.py configs/hypernetwork.py data.path=photos
    python train/run.py configs/hypernetwork.py data.path=photos method.activation=mish 'method.dropout=(0, 0.3, 0)'

Writes export/NAME.pt, which A1111 opens from models/hypernetworks/; NAME is the run's folder.  Optimizer and
learning rate are A1111's defaults.
"""

from sdjax.data.batches import Data
from sdjax.methods.hypernetwork import Hypernetwork
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Hypernetwork(),
        data=Data(batch=4, buckets=3),
        optim=Optim(lr=1e-5),
        steps=2000,
    )
