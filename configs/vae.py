"""A better decoder for the same latents: an autoencoder's decoder alone, so that every model of these latents keeps.

    python train/run.py configs/vae.py data.path=photos
    python train/run.py configs/vae.py data.path=photos perceptual=vgg16-397923af.pth,vgg.pth method.perceptual=0.1

As sd-vae-ft-mse was made: squared error, with LPIPS of weight 0.1 where its files are given, and a moving average.
The whole autoencoder: method.pattern='' (its scaling factor is then found anew); LDM's own recipe: method.recon=l1
method.perceptual=1 method.critic=0.5 method.pattern=''.

export/ is the model with its new decoder, a folder for diffusers.
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
