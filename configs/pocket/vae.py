"""Step 1 of the embedded model: the autoencoder, from nothing.

    python train/run.py configs/pocket/vae.py

8 latent channels at a quarter of the picture's side (4 hold some 3 dB less); squared error and a little KL, because
the target is PSNR.
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
