"""Step 4 of the embedded model: trains E4T's encoder and offsets for "face", and the UNet further.

    python train/run.py configs/pocket/e4t.py

The encoder reads a different picture of the person than the UNet draws (our choice; the paper uses one picture).
The prompt names scene and style, so the word only needs to carry the person.  Half of the prompts name looks
instead, so the UNet and the text encoder keep their vocabulary (our choice: the paper's UNet is already trained and
frozen).

Offsets and the word's row need low rates: an offset is a product of three learned factors, so a step of 1e-3 would
change a weight by a quarter.  The word's row is a sum over a thousand features.  min_snr: words hardly matter at low
noise (docs/log/2026-11.md).
"""

from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.methods.chain import Chain
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        model="outputs/unet/export",
        method=Chain((E4T(word="*s", domain="face", penalty=1e-6, vision=True), Full(("unet", "text_encoder")))),
        data=Data(
            path="pocketland",
            source=Pocketland(domain="face", named=0.5),
            word="*s",
            batch=64,
            dropout=0.1,
            cache="outputs/cache",
            concept="other",
        ),
        optim=Optim(
            lr=1e-3,
            schedule="cosine",
            warmup=50,
            weight_decay=0.0,
            betas=(0.9, 0.99),
            rates=(
                ("^0.vision", 0.3),
                ("^0.head.clip", 0.3),
                ("^0.head.final", 0.1),
                ("^0.offsets", 0.02),
                ("^1.unet", 0.5),
                ("^1.text_encoder", 0.15),
            ),
        ),
        steps=1200,
        ema=0.995,
        min_snr=0.3,
        checkpoint=50,
        preview=1000,
        prompts=(
            "a photo of [name] at the beach",
            "a pencil drawing of [name]",
            "a photo of [name] wearing a hat in the snow",
        ),
    )
