"""Trains an autoencoder's decoder alone, so that every model with the same latents can use it.

    python train/run.py configs/vae.py data.path=photos
    python train/run.py configs/vae.py data.path=photos perceptual=vgg16-397923af.pth,vgg.pth method.perceptual=0.1

Follows sd-vae-ft-mse: squared error, LPIPS with weight 0.1 if you give its files, and a moving average.  The whole
autoencoder: method.pattern='' (the scaling factor is then recomputed).  LDM's own recipe: method.recon=l1
method.perceptual=1 method.critic=0.5 method.pattern=''.
"""

from sdjax.data.batches import Data
from sdjax.methods.vae import Vae
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Vae(recon="l2", pattern=r"^(decoder|post_quant_conv)\."),
        data=Data(templates="none", encode=False, batch=4, crop="random"),
        optim=Optim(lr=1e-5, weight_decay=0.0, betas=(0.5, 0.9)),
        steps=10000,
        ema=0.999,
    )
