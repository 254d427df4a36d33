"""Step 1 of the embedded model: trains the autoencoder from scratch.

    python train/run.py configs/pocket/vae.py

It has 8 latent channels at a quarter of the picture's side; 4 channels lose about 3 dB.  The loss is the squared
error with a small KL term, because the target is PSNR.
"""

from sdjax.data.batches import Data
from sdjax.methods.vae import Vae
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        model="new:pocket",
        method=Vae(recon="l2", kl=1e-5),
        data=Data(path="pocketland", cache="outputs/cache", encode=False, batch=8),
        optim=Optim(lr=2e-3, schedule="cosine", warmup=100, weight_decay=0.0, betas=(0.9, 0.99)),
        steps=3600,
        ema=0.999,
        checkpoint=500,
        preview=1000,
    )
