"""Pivotal tuning: learns a word by textual inversion and a LoRA around it, together or in two stages.

    python train/run.py configs/pivotal.py data.path=photos/dog method.parts.0.init=dog data.word="<new> dog"

export/NAME.safetensors holds both; NAME is the run's folder.  In two stages, train the word first, then freeze it with
optim.rates='(("rows", 0),)':

    python train/run.py configs/textual_inversion.py data.path=photos/dog method.init=dog out=outputs/word
    python train/run.py configs/pivotal.py data.path=photos/dog data.word="<new> dog" init=outputs/word/export

The whole UNet instead of a LoRA: configs/dreambooth_word.py.

The learning rates follow cloneofsimo's pivotal tuning: 5e-4 for the word, 1e-4 for the LoRA.
"""

from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.methods.chain import Chain
from sdjax.methods.lora import Lora
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Chain((TextualInversion(word="<new>"), Lora(rank=16, alpha=16.0))),
        data=Data(templates="trigger", batch=2, buckets=3),
        class_data=ClassData(identifiers=("<new>",)),
        optim=Optim(lr=1e-4, rates=(("rows", 5.0),)),
        steps=1000,
        prompts=("a photo of [name]",),
    )
