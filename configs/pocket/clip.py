"""Step 2 of the embedded model: trains text and image encoder to match captions and pictures.

    python train/run.py configs/pocket/clip.py

Captions name all looks and no scene, because E4T's encoder reads looks from the vision tower.  If captions name
both, scenes alone identify most pictures of a batch, and the tower hardly learns looks (docs/log/2026-11.md).
"""

from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.methods.clip import Clip
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        model="outputs/vae/export",
        method=Clip(),
        data=Data(path="pocketland", cache="outputs/cache", encode=False, batch=128, source=Pocketland(looks=True)),
        optim=Optim(lr=1e-3, schedule="cosine", warmup=50, weight_decay=0.05),
        steps=300,
        checkpoint=100,
    )
