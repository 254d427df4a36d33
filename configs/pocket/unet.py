"""Step 3 of the embedded model: trains the UNet from scratch, and the text encoder with it.

python train/run.py configs/pocket/unet.py
"""

from sdjax.data.batches import Data
from sdjax.methods.full import Full
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        model="outputs/clip/export",
        method=Full(("unet", "text_encoder")),
        data=Data(path="pocketland", batch=64, dropout=0.1, cache="outputs/cache"),
        optim=Optim(
            lr=1e-3,
            schedule="cosine",
            warmup=300,
            weight_decay=0.01,
            betas=(0.9, 0.99),
            rates=(("^text_encoder", 0.3),),
        ),
        steps=12000,
        ema=0.9995,
        min_snr=5.0,
        checkpoint=250,
        preview=1000,
        prompts=(
            "a photo of a face with red hair on the beach",
            "a pencil sketch of a face with long blond hair in space",
            "a watercolor painting of a face with dark skin wearing a hat in the snow",
            "a neon picture of a face wearing glasses in the city",
        ),
    )
