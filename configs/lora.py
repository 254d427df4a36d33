"""Trains a LoRA on a few pictures with captions: low-rank changes of the UNet's transformers.

    python train/run.py configs/lora.py data.path=photos/cat
    python train/run.py configs/lora.py data.path=photos/cat method.algo=dora method.text_encoder=True
    python train/run.py configs/lora.py data.path=photos/cat 'optim.rates=(("up$", 16),)' optim.lr=2e-5     # LoRA+

DreamBooth with a LoRA, for a subject with a rare name; class pictures hold on to its class:

    python train/class_images.py configs/lora.py data.path=photos/dog data.word="sks dog" data.templates=trigger
        data.batch=2 class_data.path=dogs class_data.identifiers='("sks",)'
    python train/run.py configs/lora.py data.path=photos/dog data.word="sks dog" data.templates=trigger
        data.batch=2 class_data.path=dogs class_data.identifiers='("sks",)'

Without class pictures: preserve=1 instead of class_data.path.

Writes export/NAME.safetensors with kohya's names and alpha, for diffusers, A1111 and ComfyUI.  For pictures without
captions set data.word and data.templates=object.  To save memory: compute=bfloat16 frozen=bfloat16 remat=True.  The
learning rate is the one that diffusers and sd-scripts document for SD 1.5.
"""

from sdjax.data.batches import Data
from sdjax.methods.lora import Lora
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Lora(rank=16, alpha=16.0),
        data=Data(batch=1, buckets=3),
        optim=Optim(lr=1e-4, warmup=50),
        steps=1000,
        min_snr=5.0,
    )
