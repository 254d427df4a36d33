"""Step 4 of the embedded model: E4T's encoder and offsets for the domain "face".

    python train/run.py configs/pocket/e4t.py

The encoder sees another picture of the same person than the one the UNet has to draw (our choice; the paper trains on
one picture), and the prompt names scene and style, so that the word holds who it is and not where.

Rates: an offset is a product of three learned factors, so that a step of 1e-3 would change a weight by a quarter, and
the word's row is a sum over a thousand features.  min_snr: words change little of what low noise shows (docs/log.md).
"""

from sdjax.data.batches import Data
from sdjax.methods.e4t import E4T
from sdjax.training.loop import Train
from sdjax.training.optim import Optim


def config():
    """Returns the run's settings."""
    return Train(
        model="outputs/unet/export",
        method=E4T(word="*s", domain="face", penalty=1e-6, vision=True),
        data=Data(path="pocketland", word="*s", domain="face", batch=64, cache="outputs/cache", concept="other"),
        optim=Optim(
            lr=1e-3,
            schedule="cosine",
            warmup=30,
            weight_decay=0.0,
            betas=(0.9, 0.99),
            rates=(("^vision", 0.3), ("^head.clip", 0.3), ("^head.final", 0.1), ("^offsets", 0.02)),
        ),
        steps=600,
        ema=0.99,
        min_snr=0.1,
        checkpoint=50,
        preview=1000,
        prompts=("a photo of *s at the beach", "a pencil drawing of *s", "a photo of *s wearing a hat in the snow"),
    )
